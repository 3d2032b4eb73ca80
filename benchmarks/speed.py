"""What smelt's work costs beside the work that cannot be avoided.

    python benchmarks/speed.py [--quick] [--only statistics|whole] [--cpu-time]

Statistics: one calibration pass (everything that M-SMoE, REAP and the router refit need) against
a plain transformers forward of the same batches. Bound: 1.25 × in float32 and in bfloat16.
Whole: a one-shot compression against that forward + a plain read and write of the same bytes + the
cost-matrix GEMMs at measured GEMM speed + scipy's own time on the assignments. Bound: 1.5 ×.

One thread, repeats interleaved, minimum and median. `--cpu-time` counts processor seconds, for a
machine that is busy with something else; a figure for the lab book is taken without it.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import CONFIG_MAPPING, AutoModel
from transformers.utils.logging import disable_progress_bar

from _checkpoints import qwen3, write_checkpoint
from _clock import PHASES, Clock
from _report import machine, save, show, times
from smelt.checkpoint.inputs import Batch, make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.align import pairs
from smelt.compress.calibrate import calibrate
from smelt.compress.inputs import read_text
from smelt.compress.pipeline import run_compress
from smelt.compress.plan import Plan
from smelt.recipe import CalibrationRecipe, CompressRecipe

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_experts": 64,
}
QUICK_SHAPE = {**SHAPE, "hidden_size": 256, "num_attention_heads": 4, "moe_intermediate_size": 128}

DTYPES = ("float32", "bfloat16")


def timed(now: Callable[[], float], function: Callable[[], object]) -> float:
    start = now()
    function()
    return now() - start


def interleaved(
    now: Callable[[], float], repeats: int, jobs: dict[str, Callable[[], object]]
) -> dict[str, list[float]]:
    """Seconds of every job, `repeats` times in turn; a first turn warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            took = timed(now, job)
            if turn:
                seconds[name].append(took)
    return seconds


def plain_forward(folder: Path, batches: Sequence[Batch]) -> Callable[[], None]:
    """transformers' own model without its head, on the batches."""
    model = AutoModel.from_pretrained(folder, dtype="auto").eval()

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch.inputs, use_cache=False)

    return forward


def random_batches(vocab_size: int, tokens: int) -> list[Batch]:
    """Full rows of 512 random tokens, eight rows to a batch, as the default recipe has them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab_size, (max(1, tokens // 512), 512), generator=generator)
    return [
        Batch({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool)) for ids in rows.split(8)
    ]


def statistics(
    fields: dict[str, Any], dtype: str, tokens: int, repeats: int, now: Callable[[], float]
) -> dict[str, Any]:
    """Calibration against a plain forward, and what of it is reading weights."""
    with tempfile.TemporaryDirectory(prefix="smelt-speed-") as folder:
        checkpoint = Checkpoint.open(write_checkpoint(Path(folder), fields, dtype))
        batches = random_batches(fields["vocab_size"], tokens)
        clock = Clock(now)
        reading: list[float] = []

        def ours() -> None:
            clock.seconds.clear()
            with clock.watching({"reading": [("checkpoint.walk", "Walk.load")]}):
                calibrate(checkpoint, batches, text="")
            reading.append(clock.seconds["reading"])

        jobs = {
            "plain forward": plain_forward(Path(folder), batches),
            "statistics": ours,
            "with the Gram": lambda: calibrate(checkpoint, batches, text="", input_gram=True),
        }
        seconds = interleaved(now, repeats, jobs)
    plain = times(seconds["plain forward"])
    ratios = {
        name: {kind: value / plain[kind] for kind, value in times(seconds[name]).items()}
        for name in ("statistics", "with the Gram")
    }
    return {
        "dtype": dtype,
        "tokens": tokens,
        "seconds": seconds,
        "reading": reading[1:],
        "ratio": ratios,
    }


def whole(
    fields: dict[str, Any], tokens: int, repeats: int, now: Callable[[], float]
) -> dict[str, Any]:
    """A compression by phase, and its floor by part, in turns."""
    with tempfile.TemporaryDirectory(prefix="smelt-speed-") as temporary:
        folder = Path(temporary)
        source, out = write_checkpoint(folder / "source", fields, "bfloat16"), folder / "out"
        calibration = CalibrationRecipe(num_tokens=tokens)
        recipe = CompressRecipe(
            source=str(source),
            output=str(out),
            method="m-smoe",
            experts=fields["num_experts"] // 2,
            calibration=calibration,
            workers=1,
        )
        checkpoint = Checkpoint.open(source)
        batches = make_batches(checkpoint, read_text(checkpoint, calibration), 8)
        forward = plain_forward(source, batches)
        forward()
        run_compress(recipe)  # warms up, and leaves what the floor writes a copy of
        num_gemms = count_gemms(Plan.load(out / "smelt/plan.json"))
        turns = []
        for _ in range(repeats):
            floor = {"forward": timed(now, forward)}
            floor |= copying(source, out, folder / "copy", now)
            floor["GEMMs"] = num_gemms * gemm_seconds(fields, now)
            shutil.rmtree(out)
            clock = Clock(now)
            with clock.watching(PHASES):
                seconds = timed(now, lambda: run_compress(recipe))
            floor["assignments"] = clock.seconds["assignments"]
            phases = dict(clock.seconds)
            phases["the rest"] = seconds - sum(phases.values())
            turns.append(
                {
                    "seconds": seconds,
                    "ratio": seconds / sum(floor.values()),
                    "floor": floor,
                    "phases": phases,
                }
            )
    return {"tokens": tokens, "num_gemms": num_gemms, "turns": turns}


def copying(
    source: Path, out: Path, copy: Path, now: Callable[[], float], chunk: int = 1 << 24
) -> dict[str, float]:
    """A plain read of the source's shards, and a plain write of as many bytes as `out` has."""
    buffer = bytearray(chunk)

    def read() -> None:
        for file in source.glob("*.safetensors"):
            with file.open("rb", buffering=0) as handle:
                while handle.readinto(buffer):
                    pass

    def write() -> None:
        for file in out.glob("*.safetensors"):
            with (copy / file.name).open("wb", buffering=0) as handle:
                left = file.stat().st_size
                while left > 0:
                    left -= handle.write(memoryview(buffer)[: min(left, chunk)])
                os.fsync(handle.fileno())

    copy.mkdir()
    seconds = {"reading": timed(now, read), "writing": timed(now, write)}
    shutil.rmtree(copy)
    return seconds


def count_gemms(plan: Plan) -> int:
    """Products [F, D] · [D, F] that the cost matrices of a plan need: up, gate and down each."""
    return sum(
        3 * len(pairs(torch.tensor(layer.labels), torch.tensor(layer.dominants)))
        for layer in plan.layers
    )


def gemm_seconds(fields: dict[str, Any], now: Callable[[], float], repeats: int = 20) -> float:
    """One such product in float32 on this machine, contiguous operands."""
    config = CONFIG_MAPPING[fields["model_type"]](**fields)
    F, D = config.moe_intermediate_size, config.hidden_size
    a, b, out = torch.randn(F, D), torch.randn(D, F), torch.empty(F, F)
    torch.mm(a, b, out=out)
    return timed(now, lambda: [torch.mm(a, b, out=out) for _ in range(repeats)]) / repeats


def report_statistics(results: list[dict[str, Any]]) -> None:
    rows = []
    for r in results:
        plain = times(r["seconds"]["plain forward"])
        for name in ("statistics", "with the Gram"):
            ours = times(r["seconds"][name])
            ratio = r["ratio"][name]
            reading = f"{min(r['reading']):.2f} s" if name == "statistics" else ""
            cells = (f"{plain['min']:.2f} / {plain['median']:.2f} s",)
            cells += (f"{ours['min']:.2f} / {ours['median']:.2f} s", reading)
            rows.append((r["dtype"], name, *cells, ratio["min"], ratio["median"]))
    header = ("dtype", "pass", "plain forward", "ours", "of which reading", "÷ min", "÷ median")
    show(f"Statistics, {results[0]['tokens']} tokens, min / median (bound 1.25)", header, rows)


def report_whole(result: dict[str, Any]) -> None:
    turns = result["turns"]
    for title, part in (("Floor", "floor"), ("One-shot compression", "phases")):
        names = list(turns[0][part])
        rows = [(n, *_span([t[part].get(n, 0.0) for t in turns])) for n in names]
        rows.sort(key=lambda row: -row[1])
        rows.append(("total", *_span([sum(t[part].values()) for t in turns])))
        show(f"{title}, seconds ({result['tokens']} tokens)", ("part", "min", "median"), rows)
    ratio = _span([t["ratio"] for t in turns])
    print(f"\nours ÷ floor: {ratio[0]:.3f} min, {ratio[1]:.3f} median (bound 1.5)")


def _span(values: list[float]) -> tuple[float, float]:
    return min(values), median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, some seconds")
    parser.add_argument("--only", choices=["statistics", "whole"])
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds")
    options = parser.parse_args()
    now = time.process_time if options.cpu_time else time.perf_counter
    disable_progress_bar()
    torch.set_num_threads(1)
    fields = qwen3(**(QUICK_SHAPE if options.quick else SHAPE))
    tokens, repeats = (2048, 1) if options.quick else (16_384, 5)
    facts = {"machine": machine(), "shape": fields, "clock": now.__name__}
    result: dict[str, Any] = {}
    if options.only != "whole":
        found = [statistics(fields, d, tokens // 2, repeats, now) for d in DTYPES]
        report_statistics(found)
        result["statistics"] = {**facts, "passes": found}
    if options.only != "statistics":
        taken = whole(fields, tokens, min(3, repeats), now)
        report_whole(taken)
        result["whole"] = {**facts, **taken}
    if not options.quick:
        save("speed", result)


if __name__ == "__main__":
    main()
