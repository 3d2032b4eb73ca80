"""How the time of each stage grows with experts, hidden units, blocks and tokens.

    python benchmarks/scaling.py [--quick] [--cpu-time]

Small random Qwen3-MoE checkpoints; one size is varied at a time. Stages: statistics (calibrate),
plan, apply without scipy, and scipy's assignments apart (n³ in the worst case, not our code).
The exponent is the slope of log time against log size over the larger sizes, where
fixed costs weigh least, from the minimum of the repeats. Bound for our own stages: 1 in blocks and
tokens, 2 in experts. One thread.
"""

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from _checkpoints import qwen3, write_checkpoint
from _report import machine, save, show, times
from smelt.checkpoint.source import Checkpoint
from smelt.compress.apply import apply
from smelt.compress.calibrate import calibrate
from smelt.compress.facts import read_facts
from smelt.compress.pipeline import run_plan
from smelt.recipe import CompressRecipe
from speed import Clock, random_batches, timed

BASE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
}
TOKENS = 4096
AXES: dict[str, list[int]] = {
    "num_experts": [8, 16, 32, 64, 128, 256],
    "moe_intermediate_size": [64, 128, 256, 512, 1024],
    "num_hidden_layers": [2, 4, 8, 16],
    "tokens": [2048, 4096, 8192, 16_384, 32_768],
}
NAMES = {
    "num_experts": "experts E",
    "moe_intermediate_size": "hidden units F",
    "num_hidden_layers": "blocks L",
    "tokens": "tokens N",
}
STAGES = ("statistics", "plan", "apply", "assignments")
BOUNDS = {"num_experts": 2, "num_hidden_layers": 1, "tokens": 1}
"""Of the exponents of our own stages; the assignments are scipy's."""


def measure(
    fields: dict[str, Any], tokens: int, repeats: int, now: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each stage of compressing such a checkpoint to half its experts."""
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with tempfile.TemporaryDirectory(prefix="smelt-scaling-") as folder:
        source, out = (
            write_checkpoint(Path(folder) / "source", fields, "float32"),
            Path(folder, "out"),
        )
        batches = random_batches(fields["vocab_size"], tokens)
        recipe = CompressRecipe(
            source=str(source),
            output=str(out),
            method="m-smoe",
            experts=fields["num_experts"] // 2,
        )
        for turn in range(repeats + 1):
            found = _stages(source, out, batches, recipe, now)
            shutil.rmtree(out)
            for stage, took in found.items() if turn else ():
                seconds[stage].append(took)
    return seconds


def _stages(
    source: Path, out: Path, batches: list[Any], recipe: CompressRecipe, now: Callable[[], float]
) -> dict[str, float]:
    checkpoint = Checkpoint.open(source)
    facts = read_facts(checkpoint)
    kept: dict[str, Any] = {}

    def statistics() -> None:
        kept["stats"] = calibrate(checkpoint, batches, text="")

    def plan() -> None:
        kept["plan"] = run_plan(checkpoint, kept["stats"], recipe, facts)

    clock = Clock(now)
    found = {"statistics": timed(now, statistics), "plan": timed(now, plan)}
    with clock.watching({"assignments": [("compress.align", "linear_sum_assignment")]}):
        took = timed(
            now,
            lambda: apply(
                checkpoint, kept["plan"], out, stats=kept["stats"], facts=facts, workers=1
            ),
        )
    solving = clock.seconds["assignments"]
    return {**found, "apply": took - solving, "assignments": solving}


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The least-squares slope of log seconds against log size, over the larger half."""
    half = len(sizes) // 2 if len(sizes) > 3 else 0
    x = [math.log(size) for size in sizes[half:]]
    y = [math.log(max(s, 1e-9)) for s in seconds[half:]]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def run(axis: str, sizes: list[int], repeats: int, now: Callable[[], float]) -> dict[str, Any]:
    found = []
    for size in sizes:
        changes = {} if axis == "tokens" else {axis: size}
        tokens = size if axis == "tokens" else TOKENS
        found.append(measure(qwen3(**{**BASE, **changes}), tokens, repeats, now))
    seconds = {stage: [times(f[stage]) for f in found] for stage in STAGES}
    exponents = {stage: exponent(sizes, [s["min"] for s in seconds[stage]]) for stage in STAGES}
    return {"axis": axis, "sizes": sizes, "seconds": seconds, "exponents": exponents}


def report(result: dict[str, Any]) -> None:
    rows = []
    for stage in STAGES:
        cells = [f"{s['min']:.3f} / {s['median']:.3f}" for s in result["seconds"][stage]]
        rows.append((stage, *cells, f"{result['exponents'][stage]:.2f}"))
    bound = BOUNDS.get(result["axis"])
    title = f"Seconds against {NAMES[result['axis']]}, min / median"
    title += f" (bound of the exponent, but for assignments: {bound})" if bound else ""
    show(title, ("stage", *map(str, result["sizes"]), "exponent"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="three small sizes, one repeat")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds")
    options = parser.parse_args()
    now = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    axes = {a: sizes[:3] for a, sizes in AXES.items()} if options.quick else AXES
    results = []
    for axis, sizes in axes.items():
        results.append(run(axis, sizes, 1 if options.quick else 3, now))
        report(results[-1])
    if not options.quick:
        facts = {"machine": machine(), "clock": now.__name__, "base": BASE, "tokens": TOKENS}
        save("scaling", {**facts, "axes": results})


if __name__ == "__main__":
    main()
