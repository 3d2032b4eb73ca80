"""What a reconstruction is worth for the time it takes: quality against processor time.

    python benchmarks/reconstruct.py [CHECKPOINT] [--keep 0.5] [--tokens 131072]

One calibration; then the same plan with more and more gradient steps, for each target. A row's time
is that of everything after planning (walks, fits, writing) in this process's processor time, as a
multiple of the calibration's forward over the same tokens. The gain is the share of the increase of
log-perplexity on held-out text that the fit takes back. One seed.
"""

import argparse
import json
import math
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from _report import machine, save, show
from smelt.checkpoint.inputs import make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.apply import apply
from smelt.compress.facts import read_facts
from smelt.compress.inputs import read_text
from smelt.compress.pipeline import run_calibration, run_plan
from smelt.compress.walking import apply_walking
from smelt.evaluate.perplexity import measure
from smelt.recipe import CalibrationRecipe, CompressRecipe

FITS: list[dict[str, Any]] = [
    {"target": "layer", "steps": 0, "closed_form": True},
    {"target": "layer", "steps": 150, "closed_form": True},
    *({"target": "layer", "steps": n} for n in (50, 150, 400, 1000)),
    *({"target": "corrected", "steps": n} for n in (50, 150, 400, 1000)),
]
"""In the order of their time, more or less."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = str(files("smelt") / "data" / "tiny-moe")
    parser.add_argument("checkpoint", nargs="?", default=default)
    parser.add_argument("--prose", default="python:held-out:prose")
    parser.add_argument("--code", default="python:held-out:code")
    parser.add_argument("--calibrate", action="append", help="calibration text; repeatable")
    parser.add_argument("--tokens", type=int, default=131_072, help="of calibration")
    parser.add_argument("--held-out-tokens", type=int, default=16_384, help="of each text")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--method", default="reap")
    parser.add_argument("--form", default="stock")
    parser.add_argument("--fit", action="append", help="settings as JSON, not FITS; repeatable")
    parser.add_argument("--name", default="tiny-moe", help="of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, results = run(options)
    header = ("fit", "code", "prose", "gain, code", "gain, prose", "time ÷ calibration")
    show(f"Reconstruction of {options.name}, {options.keep:.0%} of the experts", header, rows)
    case = f"{options.name}, {options.method}, {options.form}, {options.keep:g}, {options.tokens}"
    save("reconstruct", {case: results})


def run(options: argparse.Namespace) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    checkpoint = Checkpoint.open(options.checkpoint)
    facts = read_facts(checkpoint)
    held_out = {
        name: read_text(
            checkpoint,
            CalibrationRecipe(
                text=(source,), num_tokens=options.held_out_tokens, sequence_length=256
            ),
        )
        for name, source in (("code", options.code), ("prose", options.prose))
    }

    def nats(folder: str | Path) -> dict[str, float]:
        opened = Checkpoint.open(folder)
        return {
            name: measure(opened, make_batches(opened, blocks, 16), blocks.num_bytes).nats
            for name, blocks in held_out.items()
        }

    calibration = CalibrationRecipe(
        text=tuple(options.calibrate or ["python:train"]),
        num_tokens=options.tokens,
        sequence_length=256,
        batch_size=16,
    )
    begun = time.process_time()
    calibrated = run_calibration(checkpoint, calibration)
    seconds = time.process_time() - begun
    original = nats(options.checkpoint)
    shared = {"stats": calibrated.stats, "facts": facts}
    rows, results, lost = [], {"machine": machine(), "calibration_seconds": seconds}, {}
    fits = [json.loads(fit) for fit in options.fit] if options.fit else FITS
    for fit in [None, *fits]:
        recipe = CompressRecipe(
            source=options.checkpoint,
            output="-",
            keep=options.keep,
            method=options.method,
            form=options.form,
            calibration=calibration,
            reconstruct=fit,
        )
        plan = run_plan(checkpoint, calibrated.stats, recipe, facts)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            begun = time.process_time()
            if fit is None:
                apply(checkpoint, plan, out, **shared)
            else:
                apply_walking(checkpoint, plan, out, batches=calibrated.batches, **shared)
            took = time.process_time() - begun
            more = {name: value - original[name] for name, value in nats(out).items()}
        lost = lost or more
        gain = {name: 1 - more[name] / lost[name] for name in more}
        label = "none"
        if fit is not None:
            closed = "closed form, " if fit.get("closed_form") else ""
            target = fit.get("target", "corrected")
            label = f"{target}, {closed}{fit.get('steps', 600)} steps"
        rows.append(
            (
                label,
                *(f"{math.exp(more[n]):.4f}" for n in ("code", "prose")),
                *(f"{gain[n]:.1%}" for n in ("code", "prose")),
                f"{took / seconds:.1f}",
            )
        )
        print(*rows[-1], flush=True)
        results[label] = {"nats_more": more, "gain": gain, "seconds": took}
    return rows, results


if __name__ == "__main__":
    main()
