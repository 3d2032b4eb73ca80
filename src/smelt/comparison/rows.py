"""What was measured on a comparison, in rows: a variant on a ground, with its seeds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from smelt.comparison.cells import Cell
from smelt.comparison.interval import Interval, interval
from smelt.comparison.schedule import Progress
from smelt.comparison.settings import FULL, Part
from smelt.study.statistics import paired

SAME, BUDGET, OTHER = "same groups", "same budget", "other budget"


@dataclass(frozen=True)
class Row:
    """A variant on a ground of a part, with the seeds that are done."""

    variant: str
    task: str
    found: Mapping[int, Mapping[str, Any]]  # by seed: what the cell's result says
    values: Mapping[int, Mapping[str, Mapping[str, float]]]  # by seed, metric and unit
    asked: int  # seeds there will be

    def metric(self, name: str) -> dict[int, float]:
        """A metric by seed."""
        return {seed: one["metrics"][name]["value"] for seed, one in self.found.items()}


def gather(progress: Progress, part: Part, task: str) -> list[Row]:
    """The rows of a part on a ground with at least one finished seed, the full model first."""
    rows = []
    for variant in dict.fromkeys((FULL, *part.variants)):
        every = [Cell(task, seed, variant) for seed in part.seeds]
        found = {cell.seed: one for cell in every if (one := progress.found(cell)) is not None}
        if found:
            values = {cell.seed: progress.values(cell) for cell in every if cell.seed in found}
            rows.append(Row(variant, task, found, values, len(every)))
    return rows


def difference(row: Row, other: Row, metric: str, resamples: int) -> Interval | None:
    """row − other over the seeds and units that both have; None where no seed is shared.

    A metric without values by unit is compared by its seeds alone (Student's t).
    """
    seeds = sorted(row.found.keys() & other.found.keys())
    if not seeds:
        return None
    ours, theirs = ([one.values[s].get(metric, {}) for s in seeds] for one in (row, other))
    units = list(ours[0])
    if not units or any(one.keys() != set(units) for one in (*ours, *theirs)):
        found = paired(row.metric(metric), other.metric(metric))
        assert found is not None
        error = None if found.sd is None else found.sd / found.n**0.5
        return Interval(found.mean, found.low, found.high, error, found.n, 0)
    table = np.array(
        [[a[u] - b[u] for u in units] for a, b in zip(ours, theirs, strict=True)], float
    )
    return interval(table, resamples=resamples)


def groups(row: Row, focus: Row) -> str | None:
    """Whether the row has the groups of the focus, or its budget at least: the worst of its seeds.

    None: one of the two is not compressed, or they have no seed in common. Pruning keeps the same
    experts and has no groups.
    """
    order = (SAME, BUDGET, OTHER)
    worst = None
    for seed in row.found.keys() & focus.found.keys():
        ours, theirs = row.found[seed].get("plan"), focus.found[seed].get("plan")
        if ours is None or theirs is None:
            return None
        one = _groups(ours, theirs)
        worst = one if worst is None else max(worst, one, key=order.index)
    return worst


def _groups(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    def total(plan: Mapping[str, Any]) -> int:
        return sum(len(layer["dominants"]) for layer in plan.values())

    if total(ours) != total(theirs):
        return OTHER
    for name, layer in theirs.items():
        own = ours.get(name)
        if own is None or own["dominants"] != layer["dominants"]:
            return BUDGET
        operators = {own["operator"], layer["operator"]}
        if not operators & {"drop", "constant"} and own["labels"] != layer["labels"]:
            return BUDGET
    return SAME


def as_value(found: Interval | None) -> dict[str, Any] | None:
    """The interval for JSON."""
    return None if found is None else asdict(found)
