"""How fast SaMoE trains, and in what memory, beside AR-MoE and share-all with wider experts.

    python benchmarks/training.py [--quick] [--only speed|memory] [--turns N]

Speed: forward, backward and AdamW step of the three models on the same tokens, in turns, one
thread, by the wall clock and by processor time (for a machine that is busy with something else),
and by phase. Held against the tokens per second that the FLOPs predict from AR-MoE (bound: at least
0.95 ×), and share-all wide against SaMoE (bound: within 3 %). No expert has a capacity here: every
model does the work that its FLOPs count.

Memory: the peak of a training process (`ru_maxrss`) without what it held before the model was
built, against `smelt.bench.memory.training_bytes` (bound: within 5 %).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from _report import machine, save, show, times
from smelt.bench.clock import Times
from smelt.bench.memory import training_memory
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM
from smelt.samoe.phases import timed as by_phase

MIB = 1 << 20
VARIANTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "AR-MoE": lambda F: {"sharing": "none", "moe_intermediate_size": F},
    "SaMoE": lambda F: {"sharing": "pool", "pool_size": 2, "moe_intermediate_size": F},
    "share-all wide": lambda F: {"sharing": "all", "moe_intermediate_size": 2 * F},
}
SPEED = {
    "D 512, every second block": {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_experts": 8,
        "vocab_size": 2048,
        "batch": 4,
        "length": 512,
    },
    "D 256, every block": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_experts": 8,
        "moe_every": 1,
        "vocab_size": 2048,
        "batch": 8,
        "length": 256,
    },
}
MEMORY = {
    "mostly experts": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_experts": 32,
        "vocab_size": 4096,
        "batch": 4,
        "length": 128,
    },
    "mostly activations": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_experts": 4,
        "vocab_size": 1024,
        "batch": 16,
        "length": 256,
    },
}
QUICK = {
    "quick": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_experts": 4,
        "vocab_size": 512,
        "batch": 4,
        "length": 64,
    }
}

JOB = """
import json, os, resource, sys
import torch
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

def steps(fields, batch, length, number):
    config = SaMoEConfig.from_preset("paper", **fields)
    model = SaMoEForCausalLM(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(config.vocab_size, (batch, length))
    for _ in range(number):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

fields, batch, length = json.loads(sys.argv[1])
torch.set_num_threads(1)
small = {**fields, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
         "moe_intermediate_size": 64, "num_experts": 2, "vocab_size": 64}
steps(small, 1, 16, 1)  # libraries, kernels and their buffers
before = resident()
steps(fields, batch, length, 3)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
print(json.dumps({"before": before, "peak": peak}))
"""
"""The measured process. A step too many would not change its peak: 3 are enough."""


def fields_of(shape: dict[str, Any], variant: str) -> tuple[dict[str, Any], int, int]:
    """The configuration's fields, and the batch."""
    fields = {k: v for k, v in shape.items() if k not in ("batch", "length")}
    fields |= {"max_position_embeddings": shape["length"], "capacity_factor": None}
    return fields | VARIANTS[variant](4 * shape["hidden_size"]), shape["batch"], shape["length"]


class Run:
    """One model in training."""

    def __init__(self, shape: dict[str, Any], variant: str) -> None:
        fields, batch, length = fields_of(shape, variant)
        self.config = SaMoEConfig.from_preset("paper", **fields)
        torch.manual_seed(0)
        self.model = SaMoEForCausalLM(self.config).train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(self.config.vocab_size, (batch, length), generator=generator)
        self.times = Times()
        self.phases: list[dict[str, float]] = []

    @property
    def flops(self) -> int:
        """Of one token's forward; a causal token attends to half of the sequence on average."""
        return self.config.flops_per_token(self.ids.shape[1] // 2)

    def step(self) -> None:
        """One, timed as a whole and by phase."""
        wall, processor = time.perf_counter(), time.process_time()
        with by_phase() as watch:
            self.model(self.ids, labels=self.ids).loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        seconds = time.perf_counter() - wall
        self.times.add(Times([seconds], [time.process_time() - processor]))
        optimiser = seconds - sum(watch.seconds.values())
        self.phases.append(dict(watch.seconds) | {"optimizer": optimiser})


def speed(shape: dict[str, Any], turns: int) -> dict[str, Any]:
    """Seconds of every variant, in turns; a first turn warms up and is not counted."""
    runs = {name: Run(shape, name) for name in VARIANTS}
    for turn in range(turns + 1):
        for run in runs.values():
            run.step()
            if turn == 0:
                run.times, run.phases = Times(), []
    base = runs["AR-MoE"]
    found = {}
    for name, run in runs.items():
        predicted = base.flops / run.flops
        clocks = {"wall": run.times.wall, "processor": run.times.processor}
        against = {"wall": base.times.wall, "processor": base.times.processor}
        found[name] = {
            "parameters": run.config.num_params(),
            "flops_per_token": run.flops,
            "tokens": run.ids.numel(),
            "seconds": clocks,
            "tokens_per_second": {k: run.ids.numel() / min(v) for k, v in clocks.items()},
            "predicted": predicted,
            "of_predicted": {k: min(against[k]) / min(v) / predicted for k, v in clocks.items()},
            "of_predicted_median": {
                k: times(against[k])["median"] / times(v)["median"] / predicted
                for k, v in clocks.items()
            },
            "phases": {k: min(p.get(k, 0.0) for p in run.phases) for k in run.phases[0]},
        }
    return found


def memory(shape: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of every variant against the formula."""
    found = {}
    for name in VARIANTS:
        fields, batch, length = fields_of(shape, name)
        done = subprocess.run(
            [sys.executable, "-c", JOB, json.dumps([fields, batch, length])],
            # freed memory goes back at once: what is left is the model's, not the allocator's
            env={
                **os.environ,
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "65536",
            },
            check=True,
            capture_output=True,
            text=True,
        )
        measured = json.loads(done.stdout.splitlines()[-1])
        config = SaMoEConfig.from_preset("paper", **fields)
        predicted = training_memory(config, batch * length)
        peak = measured["peak"] - measured["before"]
        found[name] = {
            "parameters": config.num_params(),
            "tokens": batch * length,
            "bytes": peak,
            "before": measured["before"],
            "predicted": asdict(predicted),
            "ratio": peak / predicted.peak,
        }
    return found


def report_speed(name: str, found: dict[str, Any]) -> None:
    rows = []
    for variant, r in found.items():
        per_second = r["tokens_per_second"]
        of = r["of_predicted"]
        span = times(r["seconds"]["wall"])
        rows.append(
            (
                variant,
                f"{r['parameters'] / 1e6:.1f} M",
                f"{span['min']:.2f} / {span['median']:.2f}",
                min(r["seconds"]["processor"]),
                per_second["wall"],
                per_second["processor"],
                r["predicted"],
                of["wall"],
                of["processor"],
                r["of_predicted_median"]["processor"],
            )
        )
    header = ("model", "parameters", "s a step, min / median", "CPU s", "tokens/s", "tokens/CPU s")
    header += ("FLOPs predict", "÷ prediction", "CPU ÷ prediction", "CPU medians")
    show(f"Training speed, {name} (bound 0.95)", header, rows)
    ratio = {
        k: min(found["share-all wide"]["seconds"][k]) / min(found["SaMoE"]["seconds"][k])
        for k in ("wall", "processor")
    }
    print(f"\nshare-all wide ÷ SaMoE: {ratio['wall']:.3f}, by processor {ratio['processor']:.3f}")
    phases = list(found["SaMoE"]["phases"])
    rows = [(p, *(1e3 * r["phases"].get(p, 0.0) for r in found.values())) for p in phases]
    show("Milliseconds by phase, least", ("phase", *found), rows)


def report_memory(name: str, found: dict[str, Any]) -> None:
    rows = []
    for variant, r in found.items():
        parts = (r["predicted"][k] for k in ("experts", "others", "activations", "peak"))
        cells = [f"{part / MIB:.0f}" for part in (*parts, r["bytes"])]
        rows.append((variant, *cells, r["ratio"]))
    header = ("model", "experts", "others", "activations", "formula", "measured", "÷ formula")
    show(f"Peak training memory, {name}, MiB (bound: within 5 %)", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, some seconds")
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--shape", default="", help="the shapes whose name holds this")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for part, shapes, measure, report in (
        ("speed", SPEED, lambda shape: speed(shape, options.turns), report_speed),
        ("memory", MEMORY, memory, report_memory),
    ):
        if options.only not in (None, part):
            continue
        chosen = QUICK if options.quick else {n: s for n, s in shapes.items() if options.shape in n}
        for name, shape in chosen.items():
            found = measure(shape)
            report(name, found)
            result[f"{part}, {name}"] = {"machine": machine(), "shape": shape, "models": found}
    if not options.quick:
        save("training", result)


if __name__ == "__main__":
    main()
