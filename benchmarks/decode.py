"""How near a cached decode step of SaMoE is to what this machine can do, and where it is not.

    python benchmarks/decode.py [--quick] [--turns N] [--shape NAME]
    python benchmarks/decode.py --skip CHECKPOINT [--text TEXT] [--thresholds 0.1,0.3]

Random weights, one thread, float32, models in turns. Bound: 1.3 × the larger of byte floor and
FLOP floor at batch 64, where Python does not decide (128 experts of D = 768: 4.8 GB). The small
shape and the overhead (64 experts at a width of 64) say what Python costs.

`--skip` measures a trained SaMoE model's loss when pool entries of small |α| are left out; how fast
it then is: `smelt bench decode CHECKPOINT --skip-alpha 0.1`.
"""

import argparse
import os
from dataclasses import asdict
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from _report import machine, save, show
from smelt.bench.decode import DecodeSettings, measure
from smelt.bench.skip import skip_quality
from smelt.bench.subjects import Subject, load
from smelt.bench.traffic import SaMoECost
from smelt.checkpoint.inputs import make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.inputs import read_text
from smelt.recipe import CalibrationRecipe
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM

VARIANTS: dict[str, dict[str, Any]] = {
    "AR-MoE": {"sharing": "none"},
    "SaMoE": {"sharing": "pool", "pool_size": 2},
}
WIDE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "moe_every": 1,
    "vocab_size": 4096,
}
SHAPES: dict[str, dict[str, Any]] = {
    "128 experts": {**WIDE, "num_experts": 128},
    "64 experts": {**WIDE, "num_experts": 64},
    "small": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_experts": 8,
        "vocab_size": 1024,
    },
}
BATCHES = {
    "128 experts": (64,),
    "64 experts": (1, 8, 64, 256),
    "small": (1, 8, 64, 256),
    "overhead": (64,),
}


def subject(name: str, shape: dict[str, Any], variant: str) -> Subject:
    """A model of random weights. Without learned positions, so that its routers choose evenly."""
    fields = {**shape, "max_position_embeddings": 1024, **VARIANTS[variant]}
    config = SaMoEConfig.from_preset("paper", **fields)
    torch.manual_seed(0)
    model = SaMoEForCausalLM(config).eval()
    torch.nn.init.zeros_(model.model.embed_positions.weight)  # one position for all: uneven
    return Subject(f"{variant}, {name}", model, SaMoECost(config))


def run(name: str, turns: int, *, quick: bool) -> list[dict[str, Any]]:
    """The steps of the variants of a shape."""
    shape = dict(SHAPES["64 experts" if name == "overhead" else name])
    if name == "overhead":
        shape |= {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    # two of 128 experts, 5 GB each, are too much to hold for what AR-MoE would add
    chosen = ["SaMoE"] if name == "128 experts" else list(VARIANTS)
    subjects = [subject(name, shape, variant) for variant in chosen]
    contexts = (0, 256) if name == "small" else (0,)
    batches = (1, 8) if quick else BATCHES[name]
    settings = DecodeSettings(batches=batches, contexts=contexts, turns=turns, steps=2)
    found = measure(subjects, settings)
    show(f"Decode, {name}", list(found.rows()[0]), [list(row.values()) for row in found.rows()])
    rates = found.processor_rates
    flops = {rows: round(rate / 1e9, 1) for rows, rate in rates.flops.items()}
    print(f"\nread, per CPU second: {rates.memory / 1e9:.1f} GB/s; products: {flops} GFLOP/s")
    return [{**asdict(step), "rates": asdict(found.rates)} for step in found.steps]


def skip(source: str, texts: list[str], thresholds: list[float]) -> None:
    """The loss of a checkpoint at every threshold."""
    checkpoint = Checkpoint.open(source)
    recipe = CalibrationRecipe(text=tuple(texts), num_tokens=32_768, sequence_length=128)
    batches = make_batches(checkpoint, read_text(checkpoint, recipe), 8)
    loaded = load(source, dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(loaded.model, SaMoEForCausalLM)
    rows = [
        (
            f"{s.threshold:g}",
            str([len(k) for k in s.kept]),
            s.nats,
            s.nats_more,
            s.nats_more_error,
            s.ms,
        )
        for s in skip_quality(loaded.model, batches, thresholds)
    ]
    header = ("|α| ≥", "entries run, by layer", "nats", "more", "± se, paired", "ms a batch")
    show(f"Leaving pool entries out, {checkpoint.folder.name}", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the small shape, some seconds")
    parser.add_argument("--shape", choices=list(BATCHES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--skip", metavar="CHECKPOINT")
    parser.add_argument("--text", action="append", help="held-out text of --skip")
    parser.add_argument("--thresholds", default="0.1,0.2,0.4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.skip:
        thresholds = [float(value) for value in options.thresholds.split(",")]
        skip(options.skip, options.text or ["python:held-out"], thresholds)
        return
    names = ["small"] if options.quick else [options.shape] if options.shape else list(BATCHES)
    turns = 1 if options.quick else options.turns
    result = {n: {"steps": run(n, turns, quick=options.quick)} for n in names}
    if not options.quick:
        save("decode", {n: {"machine": machine(), **found} for n, found in result.items()})


if __name__ == "__main__":
    main()
