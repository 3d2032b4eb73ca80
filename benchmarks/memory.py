"""Peak memory of compressing a checkpoint much larger than its largest block.

    python benchmarks/memory.py [--quick] [--only NAME] [--folder DIR]

A checkpoint with the real layer shape and random weights is written below a temporary folder,
compressed in a process of its own, and deleted. The peak is the process's `ru_maxrss`: everything
resident, the libraries too; shards are read, not mapped. Bound: 2 × the largest block + the hidden
states of the calibration text + 1 GiB, and 20·F² bytes for each assignment solved at a time. Where
layers are fitted: the largest block + what is kept of it in float32 with gradients and two moments
+ three times the hidden states (the stream, and a layer's inputs and outputs) + 1 GiB.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _checkpoints import mixtral, qwen3
from _report import machine, save, show

GIB = 1 << 30
HERE = Path(__file__).parent

JOB = """
import json, sys, threading, time
from pathlib import Path

stage, peak, done = "start", {}, threading.Event()

def watch():
    while not done.wait(0.02):
        lines = Path("/proc/self/status").read_text().splitlines()
        at = {k: int(v.split()[0]) << 10 for k, _, v in (l.partition(":") for l in lines)
              if k in ("VmRSS", "RssAnon")}
        if at["VmRSS"] > peak.get(stage, {"VmRSS": 0})["VmRSS"]:
            peak[stage] = at

threading.Thread(target=watch, daemon=True).start()
from smelt.compress.pipeline import run_compress
from smelt.recipe import CompressRecipe

def stages(name):
    def progress(block, number, total):
        global stage
        stage = f"{name} {number}/{total}"
    return progress

run_compress(CompressRecipe.model_validate_json(sys.argv[1]), stages=stages)
done.set()
Path(sys.argv[2]).write_text(json.dumps(peak))
"""
"""The measured process: one compression, and a thread that notes its memory by stage."""


@dataclass(frozen=True)
class Case:
    """A checkpoint shape, what is asked of it, and what the bound counts besides its blocks."""

    fields: dict[str, Any]
    experts: int
    tokens: int
    hidden_size: int
    align: str | None = None  # None: the method's own
    solves: int = 0  # assignments solved at a time
    is_fitted: bool = False  # reconstructed too

    @property
    def recipe(self) -> dict[str, Any]:
        calibration = {"num_tokens": self.tokens, "sequence_length": 512, "batch_size": 4}
        more = {"align": self.align} if self.align else {}
        workers = {"workers": self.solves} if self.solves else {}
        if self.is_fitted:
            more["reconstruct"] = {"steps": 4, "evaluations": 2, "target": "layer"}
        return {
            "method": "reap" if self.is_fitted else "m-smoe",
            "experts": self.experts,
            "calibration": calibration,
            **more,
            **workers,
        }

    def bound(self, largest_block: int) -> int:
        hidden_states = self.tokens * self.fields["hidden_size"] * 2
        if self.is_fitted:  # weights, gradients and two moments, 16 bytes each, of what is kept
            kept = largest_block / 2 * self.experts / self.fields["num_experts"]
            return round(largest_block + 16 * kept) + 3 * hidden_states + GIB
        return 2 * largest_block + hidden_states + GIB + self.solves * 20 * self.hidden_size**2


CASES = {
    "qwen3, 128 to 64": Case(qwen3(), 64, 8192, 768),
    "mixtral, 8 to 4, unaligned": Case(mixtral(), 4, 4096, 14_336, align="none"),
    "qwen3, 128 to 64, reconstructed": Case(
        qwen3(num_hidden_layers=3), 64, 8192, 768, is_fitted=True
    ),
    # Two merges a block: as many solves at a time as there are workers, and some minutes in all.
    "mixtral, 8 to 6, aligned": Case(mixtral(), 6, 4096, 14_336, solves=2),
}
_SMALL = {"num_hidden_layers": 3, "vocab_size": 4096}
QUICK = {
    "qwen3, 16 to 8": Case(qwen3(num_experts=16, **_SMALL), 8, 2048, 768),
    "qwen3, 16 to 8, reconstructed": Case(
        qwen3(num_experts=16, **_SMALL), 8, 2048, 768, is_fitted=True
    ),
    "mixtral, 8 to 4, unaligned": Case(
        mixtral(intermediate_size=1024, **_SMALL), 4, 2048, 1024, align="none"
    ),
    "mixtral, 8 to 6, aligned": Case(
        mixtral(intermediate_size=1024, **_SMALL), 6, 2048, 1024, solves=2
    ),
}


def measure(name: str, case: Case, source: Path, folder: Path) -> dict[str, Any]:
    """Compress `source` in a process of its own; its peak against the bound."""
    recipe = {"source": str(source), "output": str(folder / "out"), **case.recipe}
    stages_file = folder / "stages.json"
    job = subprocess.Popen([sys.executable, "-c", JOB, json.dumps(recipe), str(stages_file)])
    _, status, usage = os.wait4(job.pid, 0)
    job.returncode = os.waitstatus_to_exitcode(status)
    if job.returncode:
        raise SystemExit(f"{name}: the compression failed (exit status {job.returncode}).")
    shutil.rmtree(folder / "out")
    largest = largest_block(source)
    peak, bound = usage.ru_maxrss << 10, case.bound(largest)
    return {
        "machine": machine(),
        "largest_block": largest,
        "hidden_states": case.tokens * case.fields["hidden_size"] * 2,
        "peak": peak,
        "bound": bound,
        "ratio": peak / bound,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "recipe": case.recipe,
        "by_stage": json.loads(stages_file.read_text()),
    }


def largest_block(source: Path) -> int:
    """Bytes of the largest shard: one block each, the last holds what lies outside the blocks."""
    return max(f.stat().st_size for f in sorted(source.glob("*.safetensors"))[:-1])


def run(cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    written: dict[str, Any] | None = None
    source = folder / "source"
    for name, case in cases.items():
        if case.fields != written:
            shutil.rmtree(source, ignore_errors=True)
            print(f"{name}: writing the checkpoint …", flush=True)
            # In a process of its own, too: a child's peak is never below its parent's.
            arguments = [str(source), json.dumps(case.fields), "bfloat16"]
            subprocess.run([sys.executable, HERE / "_checkpoints.py", *arguments], check=True)
            written = case.fields
        size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
        print(f"{name}: {size / GIB:.2f} GiB; compressing …", flush=True)
        results[name] = measure(name, case, source, folder) | {"checkpoint_bytes": size}
        print(f"  peak {results[name]['peak'] / GIB:.2f} GiB", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, some seconds")
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    parser.add_argument("--folder", help="where the checkpoints go for a while (12 GB)")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    cases = {n: c for n, c in (QUICK if options.quick else CASES).items() if options.only in n}
    need = 0 if options.quick else 20 * GIB
    with tempfile.TemporaryDirectory(prefix="smelt-memory-", dir=options.folder) as folder:
        if shutil.disk_usage(folder).free < need:
            raise SystemExit(f"{folder}: less than 20 GB free. Name another with --folder.")
        results = run(cases, Path(folder))
    header = ("case", "checkpoint", "largest block", "peak", "bound", "peak ÷ bound")
    keys = ("checkpoint_bytes", "largest_block", "peak", "bound")
    rows = [
        (name, *(f"{r[k] / GIB:.2f} GiB" for k in keys), r["ratio"]) for name, r in results.items()
    ]
    show("Peak memory", header, rows)
    if not options.quick:
        save("memory", results)


if __name__ == "__main__":
    main()
