"""The metrics of tasks: what the harness says of every item, as columns of sums over units."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smelt.evaluate.aggregates import Columns
from smelt.evaluate.task_kinds import Row, Task

POSITIVE = 1
"""The choice that F1 of answers is about: yes."""


@dataclass(frozen=True)
class Metric:
    """How what the harness says of items becomes a number."""

    asked: str  # of the harness, by its name
    aggregate: str = "mean"
    columns: Callable[[Any, int], Sequence[float]] = lambda said, _: (float(said),)
    """Of one item: from what the harness says of it, and its number of choices."""
    guess: Callable[[float, int, int], Sequence[float]] | None = lambda chance, num, right: (
        chance,
    )
    """What is to be expected of guessing: from its chance, the number of choices, the right one."""
    join: Callable[[Columns], Columns] | None = None  # of the items of a group
    join_guess: Callable[[Columns], Columns] | None = None
    unit: str = "items"


def _pair(said: Any, _: int) -> tuple[float, float]:
    return float(said[0]), float(said[1])


def _counts(said: Any, num: int) -> list[float]:
    """Said and so, said, so: of every class, from (what is so, what is said)."""
    so, what = int(said[0]), int(said[1])
    return [float(x) for c in range(num) for x in (what == so == c, what == c, so == c)]


def _counted(chance: float, num: int, right: int) -> list[float]:
    return [x for c in range(num) for x in (chance * (c == right), chance, float(c == right))]


def _of_yes(counts: Sequence[float]) -> Sequence[float]:
    return counts[3 * POSITIVE : 3 * POSITIVE + 3]


def _sum(columns: Columns) -> Columns:
    return np.asarray(columns.sum(0))


METRICS: Mapping[str, Metric] = {
    "acc": Metric("acc"),
    "acc_norm": Metric("acc_norm", guess=lambda chance, num, right: (chance,)),
    "perplexity": Metric("perplexity", "perplexity", guess=None),
    "word_perplexity": Metric("word_perplexity", "weighted perplexity", _pair, None, unit="pages"),
    "byte_perplexity": Metric("byte_perplexity", "weighted perplexity", _pair, None, unit="pages"),
    "bits_per_byte": Metric("bits_per_byte", "bits", _pair, None, unit="pages"),
    "macro F1": Metric("f1", "macro F1", _counts, _counted),
    "F1 of answers": Metric(
        "f1",
        "F1",
        lambda said, num: _of_yes(_counts(said, num)),
        lambda chance, num, right: _of_yes(_counted(chance, num, right)),
        _sum,
        _sum,
        "questions",
    ),
    "exact match of questions": Metric(
        "acc",
        join=lambda columns: np.asarray(columns.min(0)),
        join_guess=lambda columns: np.asarray(columns.prod(0)),
        unit="questions",
    ),
    "exact_match,strict-match": Metric("exact_match", guess=None),
    "exact_match,flexible-extract": Metric("exact_match", guess=None),
    "pass@1": Metric("pass@1", guess=None),
}
"""By name. A name with a comma is that of the harness's metric and its filter."""


def columns_of(
    metric: Metric, task: Task, rows: Sequence[Row], said: Sequence[Any]
) -> tuple[Columns, Columns | None]:
    """The columns of all units, and those that guessing is expected to have.

    Args:
        said: of every item, by the harness.
    """
    nums = [len(task.choices(row)) if task.choices else 1 for row in rows]
    found = np.array([metric.columns(one, num) for one, num in zip(said, nums, strict=True)])
    guessed = None
    if metric.guess is not None and task.choices is not None:
        chances = [
            task.guess(row) if task.guess else 1 / n for row, n in zip(rows, nums, strict=True)
        ]
        rights = [int(task.ask(row) if task.is_infill else task.target(row)) for row in rows]
        each = zip(chances, nums, rights, strict=True)
        guessed = np.array([metric.guess(*one) for one in each])
    if metric.join is None:
        return found, guessed
    groups = list(units(task, rows, grouped=True).values())
    found = np.stack([metric.join(found[places]) for places in groups])
    if guessed is not None and metric.join_guess is not None:
        guessed = np.stack([metric.join_guess(guessed[places]) for places in groups])
    return found, guessed


def units(task: Task, rows: Sequence[Row], *, grouped: bool) -> dict[str, list[int]]:
    """The places of the items of every unit, by its name: an item, or the items of a group."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        name = str(row[task.group]) if grouped and task.group else str(row.get("number", place))
        found.setdefault(name, []).append(place)
    return found
