"""Zero-shot tasks: what a causal model finds likelier, scored by lm-evaluation-harness.

Items are local files, `<task>/<split>.jsonl.gz` in the folder that SMELT_DATA names; nothing is
downloaded for them. docs/evaluation.md has the protocol and the prompts.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from smelt.compress.calibrate import Progress
from smelt.errors import RecipeError, SmeltError
from smelt.evaluate.aggregates import value
from smelt.evaluate.harness_tasks import HarnessTask, ask_harness, find_tasks
from smelt.evaluate.outcomes import Outcome, TaskScore
from smelt.evaluate.task_files import Items, read_task
from smelt.evaluate.task_metrics import METRICS, columns_of, units
from smelt.evaluate.task_model import check_model, evaluating
from smelt.evaluate.task_table import TASKS
from smelt.text2text.files import data_folder

__all__ = [
    "TASKS",
    "Items",
    "TaskScore",
    "ask_items",
    "ask_outcomes",
    "evaluate_tasks",
    "read_items",
]

BATCH_SIZE = 32
"""Sequences at a time. Models of a million parameters on one thread take as long with 16 or 128."""

OTHERS = "lm_eval:"
"""Before the name of a task: lm-evaluation-harness's own, where there is one of ours too."""


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
    **settings: Any,
) -> list[TaskScore]:
    """The zero-shot scores of a causal model in memory, in the order of the tasks.

        scores = evaluate_tasks(model, tokenizer, ["blimp", "lambada"], limit=500)

    A task's own score comes first, those of its parts after it. Model and tokenizer are left as
    they were.

    Args:
        tasks: names in `task_table.TASKS`, or of lm-evaluation-harness's own tasks.
        limit: at most so many items of each task, evenly spaced over its file.
        batch_size: sequences at a time, at most: fewer where logits would not fit 1 GiB.
        data: the folder of task files; None: the one that SMELT_DATA names.
        seed: of the solved examples that are drawn; zero-shot, nothing is random.
        settings: more of `read_items`.

    Raises:
        RecipeError: an unknown task, a limit below 1, no folder of data.
        SmeltError: lm_eval is not installed; a file is missing or holds something else.
        CheckpointError: the model is not causal, its tokenizer has no token to begin with or is
            of another model, or its outputs are NaN.
    """
    items = read_items(tasks, limit=limit, data=data, **settings)
    return ask_items(model, tokenizer, items, batch_size=batch_size, seed=seed, progress=progress)


def read_items(
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    data: str | Path | None = None,
    shots: int | None = None,
    execute_code: bool = False,
    task_folder: str | Path | None = None,
) -> list[Items | HarnessTask]:
    """The items of tasks, read once for any number of models. Arguments as of `evaluate_tasks`.

    Args:
        shots: solved examples before every question; None: as many as each task has by itself,
            mostly none.
        execute_code: allow tasks that execute what the model writes (HumanEval), in a process that
            may do little else.
        task_folder: of more tasks of lm-evaluation-harness, as its YAML files.
    """
    load_harness()  # what is missing is said before anything is read
    if not tasks:
        raise RecipeError(f"no task is named. The tasks are: {', '.join(TASKS)}.")
    if limit is not None and limit < 1:
        raise RecipeError(
            f"limit = {limit}: at least one item of a task is asked. Leave it out to ask all."
        )
    if shots is not None and shots < 0:
        raise RecipeError(f"shots = {shots}: say how many solved examples, 0 or more.")
    names = list(dict.fromkeys(tasks))
    own = [name for name in names if name in TASKS]
    _check_own(own, shots, execute_code)
    others = find_tasks(
        [name for name in names if name not in TASKS],
        prefix=OTHERS,
        own=tuple(TASKS),
        limit=limit,
        shots=shots,
        execute_code=execute_code,
        task_folder=task_folder,
    )
    folder = data_folder(data) if own else Path()
    read: list[Items | HarnessTask] = []
    for name in names:
        if name in TASKS:
            task = TASKS[name]
            number = task.shots if shots is None else shots
            read.append(read_task(name, task, folder, limit=limit, shots=number))
        else:
            read += others[name]
    return read


def _check_own(names: Sequence[str], shots: int | None, execute_code: bool) -> None:
    for name in names:
        if TASKS[name].runs_code and not execute_code:
            raise RecipeError(
                f"{name} executes what the model writes, and that is off. Allow it with "
                "--execute-code: each program runs in a process of its own with little memory, "
                "little time and no network (docs/evaluation.md)."
            )
        if shots and TASKS[name].examples is None:
            raise RecipeError(
                f"{name} has no solved examples to show. Leave --shots out, or ask it by itself."
            )


def ask_items(
    model: PreTrainedModel,
    tokenizer: Any,
    items: Sequence[Items | HarnessTask],
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """`evaluate_tasks` on items that are read already."""
    found = ask_outcomes(
        model, tokenizer, items, batch_size=batch_size, seed=seed, progress=progress
    )
    return [one.score() for one in found]


def ask_outcomes(
    model: PreTrainedModel,
    tokenizer: Any,
    items: Sequence[Items | HarnessTask],
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Outcome]:
    """`ask_items` with what every unit adds to each score: to compare two models in pairs."""
    harness = load_harness()
    check_model(model, tokenizer)
    found: list[Outcome] = []
    with evaluating(model):
        scorer = harness.Scorer(model, tokenizer, batch_size)
        for one in items:
            if progress is not None:
                scorer.told = partial(progress, one.name)
            if isinstance(one, HarnessTask):
                found += ask_harness(harness, scorer, one, seed)
            else:
                found += _outcomes(harness, scorer, one, seed)
    return found


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


def _outcomes(harness: ModuleType, scorer: Any, items: Items, seed: int) -> list[Outcome]:
    """The metrics over all items, then over those of every part."""
    task = items.task
    asked = harness.ask(
        scorer, items.name, task, items.rows, seed, shots=items.shots, examples=items.examples
    )
    groups: dict[str, list[int]] = {items.name: list(range(len(items.rows)))}
    if task.part is not None:
        for index, row in enumerate(items.rows):
            groups.setdefault(f"{items.name}:{task.part(row)}", []).append(index)
    cut = asked.most_tokens
    source = str(items) + ("" if cut is None else f", answers of at most {cut} tokens")
    found = []
    for name, group in groups.items():
        rows = [items.rows[i] for i in group]
        for title in task.metrics:
            metric = METRICS[title]
            said = asked.said[title if title in asked.said else metric.asked]
            columns, guessed = columns_of(metric, task, rows, [said[i] for i in group])
            found.append(
                Outcome(
                    task=name,
                    metric=title,
                    aggregate=metric.aggregate,
                    columns=columns,
                    names=tuple(units(task, rows, grouped=metric.join is not None)),
                    source=source,
                    sha256=items.sha256,
                    chance=None if guessed is None else value(metric.aggregate, guessed),
                    unit=metric.unit,
                    num_cut=sum(asked.is_cut[i] for i in group),
                    harness={
                        "lm_eval": harness.VERSION,
                        "shots": items.shots,
                        "prompts": asked.prompts,
                    },
                )
            )
    return found
