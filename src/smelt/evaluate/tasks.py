"""Zero-shot tasks: what a causal model finds likelier, scored by lm-evaluation-harness.

Items are local files, `<task>/<split>.jsonl.gz` in the folder that SMELT_DATA names; nothing is
downloaded. docs/evaluation.md has the protocol and the prompts.
"""

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import Progress
from smelt.errors import RecipeError, SmeltError
from smelt.evaluate.results import Result, Setting, record
from smelt.evaluate.task_model import check_model, evaluating
from smelt.evaluate.task_table import TASKS, Row, Task
from smelt.text2text.files import data_folder

BATCH_SIZE = 32
"""Sequences at a time. Models of a million parameters on one thread take as long with 16 or 128."""


@dataclass(frozen=True)
class Items:
    """The items of a task that are asked: all of its file, or every so many of them."""

    name: str
    task: Task
    rows: list[Row]
    sha256: str  # of the items as the file spells them

    def __str__(self) -> str:
        """As a person names them: file and split, and that they are a subset."""
        text = f"{self.name}/{self.task.split}"
        if len(self.rows) == self.task.published:
            return text
        return f"{text} (subset: {len(self.rows):,} of {self.task.published:,} items)"


@dataclass(frozen=True)
class TaskScore:
    """One metric of a model on a task."""

    task: str  # its name; "blimp:syntax" is a part of one
    metric: str  # acc, acc_norm (by characters of the answer), perplexity (of the last word)
    value: float
    standard_error: float | None  # over items; None: there is one
    n: int  # items
    chance: float | None  # of guessing evenly among an item's choices; None: there are none
    source: str  # `str` of the items
    sha256: str  # of the items
    num_cut: int = 0  # items whose beginning did not fit the model's positions

    def record(self, checkpoint: Checkpoint, *, seed: int = 0, device: str = "cpu") -> Result:
        """The score as a named record."""
        cut = f", {self.num_cut:,} of {self.n:,} cut on the left" if self.num_cut else ""
        found = record(
            checkpoint,
            Setting((self.source + cut,), self.sha256, seed, device),
            task=self.task,
            metric=self.metric,
            value=self.value,
            n=self.n,
            standard_error=self.standard_error,
            chance=self.chance,
        )
        return replace(found, versions={**found.versions, "lm_eval": version("lm_eval")})


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    data: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """The zero-shot scores of a causal model in memory, in the order of the tasks.

        scores = evaluate_tasks(model, tokenizer, ["blimp", "lambada"], limit=500)

    A task's own score comes first, those of its parts after it. Model and tokenizer are left as
    they were.

    Args:
        tasks: names in `task_table.TASKS`.
        limit: at most so many items of each task, evenly spaced over its file.
        batch_size: sequences at a time, at most: fewer where logits would not fit 1 GiB.
        data: the folder of task files; None: the one that SMELT_DATA names.
        seed: handed to the harness; nothing zero-shot is random.

    Raises:
        RecipeError: an unknown task, a limit below 1, no folder of data.
        SmeltError: lm_eval is not installed; a file is missing or holds something else.
        CheckpointError: the model is not causal, its tokenizer has no token to begin with or is
            of another model, or its outputs are NaN.
    """
    items = read_items(tasks, limit=limit, data=data)
    return ask_items(model, tokenizer, items, batch_size=batch_size, seed=seed, progress=progress)


def read_items(
    tasks: Sequence[str], *, limit: int | None = None, data: str | Path | None = None
) -> list[Items]:
    """The items of tasks, read once for any number of models. Arguments as of `evaluate_tasks`."""
    load_harness()  # what is missing is said before anything is read
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise RecipeError(
            f"{f'there is no task {unknown[0]!r}' if unknown else 'no task is named'}. "
            f"The tasks are: {', '.join(TASKS)}."
        )
    if limit is not None and limit < 1:
        raise RecipeError(
            f"limit = {limit}: at least one item of a task is asked. Leave it out to ask all."
        )
    folder = data_folder(data)
    return [_read(name, folder, limit) for name in dict.fromkeys(tasks)]


def ask_items(
    model: PreTrainedModel,
    tokenizer: Any,
    items: Sequence[Items],
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """`evaluate_tasks` on items that are read already."""
    harness = load_harness()
    check_model(model, tokenizer)
    scores = []
    with evaluating(model):
        scorer = harness.Scorer(model, tokenizer, batch_size)
        for one in items:
            if progress is not None:
                scorer.told = partial(progress, one.name)
            asked = harness.ask(scorer, one.name, one.task, one.rows, seed)
            scores += _scores(harness, one, asked)
    return scores


def load_harness() -> ModuleType:
    """The module that works with lm_eval, or a SmeltError that says how to install it."""
    try:
        from smelt.evaluate import task_harness
    except ImportError as error:
        raise SmeltError(
            f"Tasks are scored by lm-evaluation-harness, which is not here ({error}). "
            "Install it with: pip install 'smelt[eval]'."
        ) from None
    return task_harness


def _scores(harness: ModuleType, items: Items, asked: Any) -> list[TaskScore]:
    """The metrics over all items, then over those of every part."""
    task = items.task
    groups: dict[str, list[int]] = {items.name: list(range(len(items.rows)))}
    if task.part is not None:
        for index, row in enumerate(items.rows):
            groups.setdefault(f"{items.name}:{task.part(row)}", []).append(index)
    scores = []
    for name, group in groups.items():
        for metric in task.metrics:
            value, error = harness.summary(metric, [asked.values[metric][i] for i in group])
            guesses = [1 / len(task.choices(items.rows[i])) for i in group] if task.choices else []
            scores.append(
                TaskScore(
                    task=name,
                    metric=metric,
                    value=value,
                    standard_error=error,
                    n=len(group),
                    chance=sum(guesses) / len(guesses) if guesses else None,
                    source=str(items),
                    sha256=items.sha256,
                    num_cut=sum(asked.is_cut[i] for i in group),
                )
            )
    return scores


def _read(name: str, folder: Path, limit: int | None) -> Items:
    task = TASKS[name]
    path = folder / name / f"{task.split}.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [line for line in file if line.strip()]
    except FileNotFoundError:
        raise SmeltError(
            f"{path}: there is no such file, and the task {name} is read from it."
        ) from None
    except (OSError, EOFError, ValueError) as error:
        raise SmeltError(f"{path}: cannot be read as gzipped UTF-8 ({error}).") from None
    if not lines:
        raise SmeltError(f"{path}: holds no item.")
    count = len(lines) if limit is None else min(limit, len(lines))
    chosen = [i * len(lines) // count for i in range(count)]
    rows: list[Row] = []
    for place, number in enumerate(chosen):
        rows.append(_parse(lines[number], f"{path}, item {number + 1}", task, place))
    digest = hashlib.sha256("".join(lines[number] for number in chosen).encode())
    return Items(name, task, rows, digest.hexdigest())


def _parse(line: str, where: str, task: Task, place: int) -> Row:
    """One item and its place, tried out: a file of another kind is found before any model runs."""
    try:
        found = json.loads(line)
        row = {name: found[name] for name in task.fields} | {"place": place}
        question, answer = task.ask(row), task.target(row)
        if task.choices is not None:
            right = question if task.is_infill else answer
            if right not in range(len(task.choices(row))):
                raise ValueError(f"answer {right} of {len(task.choices(row))} choices")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SmeltError(
            f"{where}: not an item of this task ({type(error).__name__}: {error}). An item has "
            f"the fields {', '.join(task.fields)}."
        ) from None
    return row
