"""Which method at which ratio: perplexity after compression, every variant under one harness.

    python benchmarks/quality.py                        the checkpoint inside the package
    python benchmarks/quality.py CHECKPOINT --prose FILE --code python:held-out:code

For every calibration seed: one calibration, then every variant at every share of experts kept, each
compressed through the whole pipeline and evaluated on held-out prose and code. A figure is the
perplexity divided by the original's on the same tokens; a table shows mean ± sd over the seeds.
Results are appended to a JSON-lines file as they come; what is there is not run again.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import smelt
from smelt.checkpoint.inputs import make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.apply import apply
from smelt.compress.facts import Facts, read_facts
from smelt.compress.inputs import read_text
from smelt.compress.pipeline import Calibrated, run_calibration, run_plan
from smelt.compress.plan import Plan
from smelt.compress.walking import apply_walking
from smelt.evaluate.perplexity import measure
from smelt.recipe import CalibrationRecipe, CompressRecipe

MAPPED: dict[str, Any] = {"method": "m-smoe", "form": "mapped", "budget": "uniform"}
STOCK: dict[str, Any] = {"method": "m-smoe", "form": "stock"}
VARIANTS: dict[str, dict[str, Any]] = {
    "m-smoe, mapped, global budget": {**MAPPED, "budget": "global"},
    "m-smoe, mapped, uniform budget (the reference)": MAPPED,
    "· unaligned": {**MAPPED, "align": "none"},
    "· aligned by activations": {**MAPPED, "align": "activations"},
    "· random groups": {**MAPPED, "similarity": "random"},
    "· plain-mean weights": {**MAPPED, "weights": "mean"},
    "· dominants and weights by saliency": {**MAPPED, "score": "saliency"},
    "· dominants and weights by mean saliency": {**MAPPED, "score": "mean-saliency"},
    "· centred cosine": {**MAPPED, "similarity": "router-logits-centered"},
    "· groups by expert outputs": {**MAPPED, "similarity": "expert-feature"},
    "· sequential": {**MAPPED, "sequential": True},
    "m-smoe, stock, dominant rows": {**STOCK, "router": "dominant"},
    "m-smoe, stock, mean rows": {**STOCK, "router": "mean"},
    "m-smoe, stock, refitted rows": {**STOCK, "router": "refit"},
    "m-smoe by saliency, mapped, global budget": {
        **MAPPED,
        "score": "saliency",
        "budget": "global",
    },
    "m-smoe by saliency, stock, dominant rows": {**STOCK, "score": "saliency"},
    "m-smoe by saliency, stock, refitted rows": {**STOCK, "score": "saliency", "router": "refit"},
    "m-smoe by mean saliency, stock, dominant rows": {**STOCK, "score": "mean-saliency"},
    "m-smoe by mean saliency, stock, refitted rows": {
        **STOCK,
        "score": "mean-saliency",
        "router": "refit",
    },
    "frequency pruning": {"method": "frequency", "form": "stock"},
    "ean pruning": {"method": "ean", "form": "stock"},
    "reap pruning": {"method": "reap", "form": "stock"},
    "reap pruning, refitted rows": {"method": "reap", "form": "stock", "router": "refit"},
}


def main() -> None:
    options = arguments()
    rows = [json.loads(line) for line in lines(options.output)]
    if not options.table:
        torch.set_num_threads(options.threads)
        for row in run(options, {key(row) for row in rows}):
            rows.append(row)
            with options.output.open("a") as handle:
                handle.write(json.dumps(row) + "\n")
            print(f"{row['variant']:52} {row['keep']:4} seed {row['seed']} {row['text']:6}"
                  f" {row['ratio']:.4f}", flush=True)  # fmt: skip
    print(table(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = str(files("smelt") / "data" / "tiny-moe")
    parser.add_argument("checkpoint", nargs="?", default=default)
    parser.add_argument("--prose", default="python:held-out:prose")
    parser.add_argument("--code", default="python:held-out:code")
    parser.add_argument("--calibrate", action="append", help="calibration text; repeatable")
    parser.add_argument("--tokens", type=int, default=32_768, help="of calibration")
    parser.add_argument("--held-out-tokens", type=int, default=16_384, help="of each text")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/quality-tiny.jsonl")
    )
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    return parser.parse_args()


def lines(path: Path) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.read_text().splitlines() if path.is_file() else []


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["variant"], row["keep"], row["seed"], row["text"]


def run(options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    checkpoint = Checkpoint.open(options.checkpoint)
    facts = read_facts(checkpoint)
    held_out = {
        name: CalibrationRecipe(
            text=(source,), num_tokens=options.held_out_tokens, sequence_length=options.length
        )
        for name, source in (("prose", options.prose), ("code", options.code))
    }
    texts = {name: read_text(checkpoint, recipe) for name, recipe in held_out.items()}

    def nats(folder: str | Path) -> dict[str, float]:
        opened = Checkpoint.open(folder)
        return {
            name: measure(opened, make_batches(opened, blocks, 16), blocks.num_bytes).nats
            for name, blocks in texts.items()
        }

    original = nats(options.checkpoint)
    for seed in options.seeds:
        calibration = CalibrationRecipe(
            text=tuple(options.calibrate or ["python:train"]),
            num_tokens=options.tokens,
            sequence_length=options.length,
            batch_size=16,
            seed=seed,
        )
        wanted = [
            (name, keep)
            for keep in options.keep
            for name in VARIANTS
            if any((name, keep, seed, text) not in done for text in texts)
        ]
        if not wanted:
            continue
        calibrated = run_calibration(checkpoint, calibration)
        for name, keep in wanted:
            recipe = CompressRecipe(
                source=options.checkpoint,
                output="",
                keep=keep,
                seed=seed,
                calibration=calibration,
                **VARIANTS[name],
            )
            plan = run_plan(checkpoint, calibrated.stats, recipe, facts)
            with compressed(checkpoint, facts, calibrated, plan) as folder:
                found = nats(folder)
            for text, value in found.items():
                yield {
                    "variant": name,
                    "keep": keep,
                    "seed": seed,
                    "text": text,
                    "nats": value,
                    "original_nats": original[text],
                    "ratio": math.exp(value - original[text]),
                    "checkpoint": checkpoint.fingerprint,
                    "calibration": calibration.model_dump(mode="json"),
                    "held_out": held_out[text].model_dump(mode="json"),
                    "bytes": plan.predicted.bytes_after,
                    "smelt": smelt.__version__,
                }


@contextmanager
def compressed(
    checkpoint: Checkpoint, facts: Facts, calibrated: Calibrated, plan: Plan
) -> Iterator[Path]:
    """The checkpoint that the plan makes, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        shared = {"stats": calibrated.stats, "facts": facts}
        if plan.method.sequential:
            apply_walking(checkpoint, plan, out, batches=calibrated.batches, **shared)
        else:
            apply(checkpoint, plan, out, **shared)
        yield out


def table(rows: list[dict[str, Any]]) -> str:
    """Perplexity ÷ original, mean ± sd over calibration seeds, as Markdown."""
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    texts = sorted({row["text"] for row in rows})
    head = [f"{text} {keep:.0%}" for keep in keeps for text in texts]
    out = ["| variant | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    for name in VARIANTS:
        cells = []
        for keep in keeps:
            for text in texts:
                found = [
                    row["ratio"]
                    for row in rows
                    if (row["variant"], row["keep"], row["text"]) == (name, keep, text)
                ]
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                cells.append(f"{statistics.mean(found):.3f} ± {spread:.3f}" if found else "")
        if any(cells):
            out.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
