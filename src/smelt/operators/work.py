"""The process of one job: `python -m smelt.operators.work FILE.yaml`."""

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from smelt.errors import RecipeError
from smelt.operators.settings import Texts
from smelt.recipe import CalibrationRecipe, CompressRecipe
from smelt.settings import Settings

if TYPE_CHECKING:
    from smelt.checkpoint.source import Checkpoint
    from smelt.evaluate.item_files import Answers


class Work(Settings):
    """One job: the statistics of a model on a text, or the cells of a group."""

    kind: Literal["statistics", "cells"]
    model: str
    stats: str
    result: str
    calibration: CalibrationRecipe
    fingerprint: str | None = None  # of the checkpoint that the model's finished cells are of
    held_out: dict[str, Texts] = Field(default={})
    cells: dict[str, CompressRecipe] = Field(default={})  # by variant and fit: "reap, none"
    tasks: dict[str, tuple[str, ...]] = Field(default={})
    task_limit: int | None = None


def main(words: list[str]) -> int:
    """Do one job; returns the exit code: 0 done, 2 the input is at fault, 1 our mistake."""
    from smelt.study.work import guarded

    return guarded(lambda: _do(Path(words[0])))


def check_same(model: "Checkpoint", fingerprint: str) -> None:
    """A checkpoint other than the one that finished cells are of is a RecipeError."""
    if model.fingerprint != fingerprint:
        raise RecipeError(
            f"{model.folder}: the finished cells are of another checkpoint (fingerprint "
            f"{fingerprint[:12]}…, here {model.fingerprint[:12]}…), and a table would mix the two. "
            "Name the folder of that one, or another output and no records."
        )


def _do(path: Path) -> None:
    from smelt.checkpoint.source import Checkpoint
    from smelt.settings import load_recipe

    work = load_recipe(path, Work)
    if work.fingerprint is not None:
        check_same(Checkpoint.open(work.model), work.fingerprint)
    if work.kind == "statistics":
        _statistics(work)
    else:
        do_cells(work)


def _statistics(work: Work) -> None:
    from smelt.checkpoint.source import Checkpoint
    from smelt.compress.pipeline import run_calibration

    found = run_calibration(Checkpoint.open(work.model), work.calibration).stats
    staging = Path(work.stats + ".partial")
    found.save(staging)
    staging.replace(work.stats)


def do_cells(work: Work) -> None:
    """Every cell that is not done; its row is written as soon as it is."""
    from smelt.study.store import read, write

    result = Path(work.result)
    found: dict[str, Any] = read(result) or {"rows": {}}
    bench = _Bench(work)
    lacking = {
        name: tuple(t for t in tasks if t not in found["rows"].get(name, {}).get("tasks", {}))
        for name, tasks in work.tasks.items()
    }
    first = found.get("original", {"tasks": {}})
    every = tuple(dict.fromkeys(task for tasks in lacking.values() for task in tasks))
    if "nats" not in first or every:  # asked again with them: differences are paired by item
        new = bench.measured(work.model, every, with_text="nats" not in first)
        found["original"] = first | new | {"tasks": {**first["tasks"], **new["tasks"]}}
        write(result, found)
    for name, recipe in work.cells.items():
        row, tasks = found["rows"].get(name, {}), lacking.get(name, ())
        if "nats" in row and not tasks:
            continue
        found["rows"][name] = row | bench.cell(recipe, tasks, row)
        write(result, found)


class _Bench:
    """The model, its statistics and the held-out text, read once for all cells of a group."""

    def __init__(self, work: Work) -> None:
        from smelt.checkpoint.inputs import make_batches
        from smelt.checkpoint.source import Checkpoint
        from smelt.compress.calibrate import RoutingStats
        from smelt.compress.facts import read_facts
        from smelt.compress.inputs import read_inputs, read_text

        self.work = work
        self.source = Checkpoint.open(work.model)
        self.facts = read_facts(self.source)
        self.stats = RoutingStats.load(work.stats)
        self.inputs = read_inputs(self.source, work.calibration)[0]
        self.answers: dict[str, Answers] = {}  # by task, of the first that was asked: the original
        self.texts = {}
        for name, texts in work.held_out.items():
            blocks = read_text(self.source, CalibrationRecipe(**texts.model_dump()))
            batches = make_batches(self.source, blocks, texts.batch_size)
            self.texts[name] = (batches, blocks.num_bytes)

    def cell(
        self, recipe: CompressRecipe, tasks: tuple[str, ...], known: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Compress, and measure what came of it."""
        from smelt.compress.apply import apply
        from smelt.compress.pipeline import run_plan
        from smelt.compress.walking import apply_walking

        recipe = recipe.model_copy(update={"source": self.work.model})
        _reset_peak()
        begin = time.perf_counter()
        plan = run_plan(self.source, self.stats, recipe, self.facts)
        with tempfile.TemporaryDirectory(prefix="smelt-operators-") as folder:
            out = Path(folder) / "out"
            shared: dict[str, Any] = {"stats": self.stats, "facts": self.facts, "workers": 1}
            if plan.method.sequential or recipe.reconstruct is not None:
                apply_walking(self.source, plan, out, batches=self.inputs, **shared)
            else:
                apply(self.source, plan, out, **shared)
            seconds, peak = time.perf_counter() - begin, _peak()
            row = self.measured(str(out), tasks, with_text="nats" not in known)
            made = type(plan).load(out / "smelt" / "plan.json")
        row["tasks"] = {**known.get("tasks", {}), **row["tasks"]}
        fits = [layer.fit for layer in made.layers if layer.fit is not None]
        return row | {
            "seconds": round(seconds, 2),
            "peak_bytes": peak,
            "bytes": made.predicted.bytes_after,
            "experts": [layer.num_groups for layer in made.layers],
            "errors": [[fit.before, fit.after] for fit in fits],
            "tried": [layer.tried for layer in made.layers if layer.tried],
            "recipe": recipe.model_dump(mode="json", exclude={"source", "output"}),
        }

    def measured(
        self, folder: str, tasks: tuple[str, ...], *, with_text: bool = True
    ) -> dict[str, Any]:
        """Nats per token of each held-out text, and the tasks' scores."""
        from smelt.checkpoint.source import Checkpoint
        from smelt.evaluate.perplexity import measure

        found: dict[str, Any] = {"tasks": self._asked(folder, tasks) if tasks else {}}
        if with_text:
            opened = Checkpoint.open(folder)
            found["nats"] = {n: measure(opened, *given).nats for n, given in self.texts.items()}
        found["fingerprint"] = self.source.fingerprint
        found["versions"] = {n: version(n) for n in ("smelt", "torch", "transformers")}
        return found

    def _asked(self, folder: str, tasks: tuple[str, ...]) -> dict[str, Any]:
        """By task, its scores; with each, the difference to the original's on the same items."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from smelt.checkpoint.source import Checkpoint
        from smelt.evaluate.item_files import answers_of
        from smelt.evaluate.paired import compare_answers
        from smelt.evaluate.tasks import ask_outcomes, read_items

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        opened, found = Checkpoint.open(folder), {}
        for task in tasks:
            items = read_items([task], limit=self.work.task_limit)
            outcomes = ask_outcomes(model, tokenizer, items, batch_size=16)
            own = answers_of(opened, opened.folder.name, outcomes)
            first = self.answers.setdefault(task, own)
            pairs = [] if first is own else compare_answers([first, own])
            less = {(p.task, p.metric): dataclasses.asdict(p.difference) for p in pairs}
            found[task] = [
                dataclasses.asdict(score) | {"difference": less.get((score.task, score.metric))}
                for score in (outcome.score() for outcome in outcomes)
            ]
        return found


def _reset_peak() -> None:
    """From here on the kernel's highest mark of this process's memory counts anew (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int | None:
    """That mark, in bytes; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
