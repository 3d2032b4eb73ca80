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
import contextlib
import importlib
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from _checkpoints import qwen3, write_checkpoint
from _report import machine, save, show, times
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from smelt.checkpoint.inputs import Batch, make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.align import pairs
from smelt.compress.calibrate import calibrate
from smelt.compress.pipeline import read_text, run_compress
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

PHASES = {
    "opening": [("checkpoint.source", "Checkpoint.open"), ("compress.pipeline", "read_facts")],
    "text": [("compress.pipeline", "read_text")],
    "statistics": [("compress.pipeline", "run_calibration")],
    "reading": [("checkpoint.source", "Checkpoint.read"), ("checkpoint.sink", "raw")],
    "plan": [("compress.pipeline", "run_plan")],
    "check for NaN": [("compress.apply", "Compressor._bank")],
    "cost matrices": [("compress.align", "weight_cost"), ("compress.align", "_negated")],
    "assignments": [("compress.align", "linear_sum_assignment")],
    "merging": [("compress.apply", "merge_groups")],
    "layout": [("compress.apply", "write_bank"), ("compress.apply", "encode")],
    "writing": [("checkpoint.sink", "Sink.write")],
    "finishing": [("checkpoint.sink", "Sink.finish")],
}
"""The functions whose time makes up each phase; time inside another phase's counts there."""


class Clock:
    """Seconds by phase; the time of a phase inside another counts for the inner one alone."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def _turn(self) -> None:
        now = self.now()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def watching(self, phases: dict[str, list[tuple[str, str]]]) -> Iterator[None]:
        """Within: the named functions of smelt report to this clock."""
        with contextlib.ExitStack() as stack:
            for phase, functions in phases.items():
                for module, path in functions:
                    self._wrap(stack, phase, f"smelt.{module}", path)
            yield

    def _wrap(self, stack: contextlib.ExitStack, phase: str, module: str, path: str) -> None:
        owner = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        kept = owner.__dict__[name]
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        setattr(owner, name, staticmethod(timed) if isinstance(kept, classmethod) else timed)
        stack.callback(setattr, owner, name, kept)


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
    """A compression by phase, and its floor by part."""
    with tempfile.TemporaryDirectory(prefix="smelt-speed-") as temporary:
        folder = Path(temporary)
        source = write_checkpoint(folder / "source", fields, "bfloat16")
        calibration = CalibrationRecipe(num_tokens=tokens)
        recipe = CompressRecipe(
            source=str(source),
            output=str(folder / "out"),
            experts=fields["num_experts"] // 2,
            calibration=calibration,
            workers=1,
        )
        checkpoint = Checkpoint.open(source)
        batches = make_batches(checkpoint, read_text(checkpoint, calibration), 8)
        forward = plain_forward(source, batches)
        run_compress(recipe)
        plan = Plan.load(folder / "out/smelt/plan.json")
        turns = []
        for _ in range(repeats):
            parts = {"forward": timed(now, forward)}
            parts |= copying(source, folder / "out", folder / "copy", now)
            shutil.rmtree(folder / "out")
            clock = Clock(now)
            parts["ours"] = timed(now, lambda c=clock: watched(c, recipe))
            parts["assignments"] = clock.seconds["assignments"]
            turns.append({"floor": parts, "phases": dict(clock.seconds)})
        gemms = sum(3 * len(pairs(_labels(p), _dominants(p))) for p in plan.layers)
        gemm = gemm_seconds(plan.recipe_shape if False else fields, now)
    for turn in turns:
        turn["floor"]["GEMMs"] = gemms * gemm
        ours = turn["floor"].pop("ours")
        turn["seconds"] = ours
        turn["ratio"] = ours / sum(turn["floor"].values())
    return {"tokens": tokens, "num_gemms": gemms, "turns": turns}
