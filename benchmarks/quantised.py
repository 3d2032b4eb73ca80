"""Merge or quantise? One checkpoint, fewer experts and fewer bits, by real bytes of GGUF files.

    python benchmarks/quantised.py CHECKPOINT --work runs/quantised [--reconstruct 0.5]

The original and what REAP keeps of it (a share of the experts, as it is and reconstructed) are
written by `smelt export --gguf` in several types, and run by llama.cpp on two held-out texts. The
table is sorted by bytes and marks the Pareto front; the sentence below it is computed from it. What
is in the work folder is not made again, so that a run that was stopped goes on.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from _report import machine, save, show
from smelt import api
from smelt.bench.gguf_decode import measure as decode
from smelt.checkpoint.inputs import make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.inputs import read_text
from smelt.evaluate.gguf_loss import measure_file, open_files
from smelt.evaluate.matched_bytes import Point, best_by_bytes, merge_or_quantise
from smelt.evaluate.perplexity import measure
from smelt.evaluate.sequences import PerSequence
from smelt.export.gguf_file import GgufFile
from smelt.recipe import CalibrationRecipe

SCHEMES = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
KEPT = (0.75, 0.5, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and files")
    parser.add_argument("--code", default="python:held-out:code")
    parser.add_argument("--prose", default="${SMELT_DATA}/gutenberg/validation.txt")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each held-out text")
    parser.add_argument("--calibrate", action="append", help="calibration text; repeatable")
    parser.add_argument("--calibration-tokens", type=int, default=131_072)
    parser.add_argument("--method", default="reap")
    parser.add_argument("--keep", type=float, action="append", help=f"repeatable {KEPT}")
    parser.add_argument("--scheme", action="append", help=f"repeatable {SCHEMES}")
    parser.add_argument(
        "--reconstruct", type=float, action="append", help="a share to reconstruct too; repeatable"
    )
    parser.add_argument("--steps", type=int, default=400, help="of the reconstruction")
    parser.add_argument("--decode", action="store_true", help="time decode steps too")
    parser.add_argument("--name", help="of the results [the checkpoint's]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    points, same = run(options)
    verdict = merge_or_quantise(points)
    rows = list(table(points))
    name = options.name or Path(options.checkpoint).name
    header = ("file", "bytes", "share", "front", "nats more", "± se", "code", "prose")
    show(f"{name}: bytes against loss ({options.method})", header, rows)
    print(f"\nllama.cpp against transformers, {points[0].name}: {same:+.2e} of the perplexity")
    print(f"\n{verdict.sentence}")
    record = [dict(zip(header, row, strict=True)) for row in rows]
    part = {"machine": machine(), "rows": record, "same": same, "answer": verdict.sentence}
    if options.decode:
        files = [GgufFile(path) for path in sorted(options.work.glob("*.gguf"))]
        steps = decode(files, contexts=(0, 256))[1]
        part["decode"] = [asdict(step) for step in steps]
        rows = [(s.checkpoint, s.context, s.ms, s.ms_median) for s in steps]
        show("Decode, llama.cpp, one sequence", ("file", "context", "ms", "median"), rows)
    save("quantised", {f"{name}, {options.method}": part})


def run(options: argparse.Namespace) -> tuple[list[Point], float]:
    """Every file as a point, the original's widest first; and llama.cpp against transformers."""
    work: Path = options.work
    source = Checkpoint.open(options.checkpoint)
    batches, num_bytes = {}, {}
    for name, text in (("code", options.code), ("prose", options.prose)):
        recipe = CalibrationRecipe(text=(text,), num_tokens=options.tokens, sequence_length=256)
        blocks = read_text(source, recipe)
        batches[name], num_bytes[name] = make_batches(source, blocks, 16), blocks.num_bytes
    points = []
    for label, folder, is_merged in checkpoints(options, source):
        for scheme in options.scheme or SCHEMES:
            path = work / f"{folder.name}-{scheme}.gguf"
            if not path.exists():
                kind: dict[str, Any] = {"quantise": scheme}
                if scheme in ("BF16", "F16", "F32"):
                    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
                    kind = {"dtype": names[scheme]}
                api.export_gguf(folder, path, **kind)
            (file,) = open_files([path], source)
            losses = [
                kept_loss(file, f"{text}-{options.tokens}", part, num_bytes[text])
                for text, part in batches.items()
            ]
            points.append(
                Point(f"{label}, {scheme}", file.num_bytes, is_merged, scheme, tuple(losses))
            )
            print(points[-1].name, file.num_bytes, *(round(x.mean, 4) for x in losses), flush=True)
    loss = measure(source, batches["code"], num_bytes["code"])
    return points, math.exp(points[0].loss[0].mean - loss.nats) - 1


def checkpoints(
    options: argparse.Namespace, source: Checkpoint
) -> Iterator[tuple[str, Path, bool]]:
    """The original, and each share of its experts: as kept, and reconstructed."""
    work: Path = options.work
    yield "all experts", source.folder, False
    stats = work / "stats"
    calibration: dict[str, Any] = {
        "text": tuple(options.calibrate or ["python:train"]),
        "num_tokens": options.calibration_tokens,
        "sequence_length": 256,
        "batch_size": 16,
    }
    if not stats.exists():
        api.calibrate(source.folder, stats, **calibration)
    for keep in options.keep or KEPT:
        is_fitted = keep in (options.reconstruct or ())
        for fit in (None, {"steps": options.steps}) if is_fitted else (None,):
            folder = work / f"{options.method}-{keep:g}{'-fit' if fit else ''}"
            if not folder.exists():
                more = {} if fit is None else {"calibration": calibration, "reconstruct": fit}
                api.compress(
                    source.folder, folder, stats=stats, keep=keep, method=options.method, **more
                )
            yield f"{keep:.0%}{' reconstructed' if fit else ''}", folder, True


def kept_loss(file: GgufFile, text: str, batches: list[Any], num_bytes: int) -> PerSequence:
    """A file's loss on a text, out of the note beside it where it was measured before."""
    note = file.path.with_suffix(f".{text}.json")
    if note.exists():
        found = json.loads(note.read_text())
        if found["fingerprint"] == file.fingerprint:
            total = torch.tensor(found["total"], dtype=torch.float64)
            return PerSequence(total, torch.tensor(found["count"]))
    loss = measure_file(file, batches, num_bytes).sequences
    values = {"total": loss.total.tolist(), "count": loss.count.tolist()}
    note.write_text(json.dumps({"fingerprint": file.fingerprint, **values}))
    return loss


def table(points: list[Point]) -> Iterator[tuple[object, ...]]:
    """A row per file, the smallest first; perplexities as multiples of the original's."""
    first, best = points[0], best_by_bytes(points)
    for point in sorted(points, key=lambda p: p.num_bytes):
        mean, error = point.difference(first)
        ratios = [
            f"{math.exp(mine.minus(its).mean):.3f}"
            for mine, its in zip(point.loss, first.loss, strict=True)
        ]
        share = f"{point.num_bytes / first.num_bytes:.1%}"
        mark = "*" if point in best else ""
        yield (
            point.name,
            f"{point.num_bytes:,}",
            share,
            mark,
            f"{mean:+.4f}",
            "" if point is first else f"{error:.4f}",
            *ratios,
        )


if __name__ == "__main__":
    main()
