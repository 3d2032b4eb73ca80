"""The results of a comparison as one value for machines: rows with differences, costs, groups."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from smelt.comparison.cells import Cell
from smelt.comparison.rows import SAME, Row, as_value, difference, gather, groups
from smelt.comparison.schedule import Progress
from smelt.comparison.settings import FULL, ComparisonRecipe, Part
from smelt.study.statistics import summary
from smelt.study.store import read, write

COSTS = (
    "experts",
    "parameters",
    "nonzero_parameters",
    "parameters_of_experts",
    "bytes",
    "moe_flops_per_token",
    "flops_per_token",
)

LEAST_ERRORS = 3
"""Standard errors by which a full model should stand above what needs no model."""


def results(study: ComparisonRecipe, only: str | None = None) -> dict[str, Any]:
    """All that can be said of the cells that are done; written to OUTPUT/tables.json too.

    Args:
        study: whose cells.
        only: a part.
    """
    progress = Progress(study, only)
    timed = read(progress.store.folder / "latency.json") or {}
    found = {
        "tables": [
            table
            for name, part in study.parts.items()
            if only in (None, name)
            for task in part.tasks
            if (table := _table(progress, name, part, task, timed)) is not None
        ],
        "learning_rates": _rates(progress),
        "latency": timed,
        "unfinished": {n: state for n, state in progress.states().items() if state != "done"},
    }
    if progress.store.folder.is_dir():
        write(progress.store.folder / "tables.json", found)
    return found


def _table(
    progress: Progress, name: str, part: Part, task: str, timed: dict[str, Any]
) -> dict[str, Any] | None:
    """A part on one ground."""
    rows = gather(progress, part, task)
    if not rows:
        return None
    focus = part.focus or progress.study.focus
    beside = next((row for row in rows if row.variant == focus), None)
    if beside is None:
        beside = _focus(progress, part, task, focus)
    one = next(iter(rows[0].found.values()))
    states = {row.variant: groups(row, beside) for row in rows} if beside is not None else {}
    return {
        "part": name,
        "ground": task,
        "focus": focus,
        "items": one["items"],
        "sha256": one["sha256"],
        "without_a_model": {m: v["without_a_model"] for m, v in one["metrics"].items()},
        "gate": _gate(rows[0]),
        "groups": states,
        "other_groups": _other_groups(part, states),
        "rows": [_row(progress, row, rows, beside, timed) for row in rows],
    }


def _gate(full: Row) -> dict[str, Any] | None:
    """How far the full model stands above the best rule without a model, by its first metric.

    In standard errors over items (of the mean over seeds; all seeds answer the same items); None of
    them where there is none, as of a model that answers everything alike. None: no full model, or
    no rule.
    """
    if full.variant != FULL:
        return None
    metric, one = next(iter(full.found[min(full.found)]["metrics"].items()))
    rules, error = one["without_a_model"], one["standard_error"]
    if not rules:
        return None
    rule = max(rules, key=lambda name: float(rules[name]))
    mean = summary(list(full.metric(metric).values())).mean
    above = mean - rules[rule]
    return {
        "metric": metric,
        "rule": rule,
        "level": rules[rule],
        "above": above,
        "standard_errors": above / error if error else None,
        "is_passed": above > 0 and above >= LEAST_ERRORS * (error or 0),
    }


def _focus(progress: Progress, part: Part, task: str, focus: str) -> Row | None:
    """The focus where the part does not list it: its cells of other parts."""
    other = part.model_copy(update={"variants": (focus,)})
    return next((row for row in gather(progress, other, task) if row.variant == focus), None)


def _other_groups(part: Part, states: dict[str, str | None]) -> list[str]:
    """Rows that should have the groups of the focus, and have others."""
    if not part.same_groups:
        return []
    return [name for name, state in states.items() if state not in (None, SAME)]


def _row(
    progress: Progress, row: Row, rows: Sequence[Row], focus: Row | None, timed: dict[str, Any]
) -> dict[str, Any]:
    full = next((one for one in rows if one.variant == FULL), None)
    first = row.found[min(row.found)]
    costs = [one["costs"] for one in row.found.values()]
    healing = [one["healing"] for one in row.found.values() if "healing" in one]
    seconds: dict[str, list[float]] = {}
    for one in row.found.values():
        for what, taken in one["seconds"].items():
            seconds.setdefault(what, []).append(taken)
    return {
        "row": row.variant,
        "seeds": sorted(row.found),
        "seeds_asked": row.asked,
        "metrics": {
            name: {
                **asdict(summary(list(row.metric(name).values()))),
                "by_seed": row.metric(name),
                "n": one["n"],
                "unit": one["unit"],
                "standard_error_of_items": one["standard_error"],
                "less_full": _less(row, full, name, progress.study.resamples),
                "less_focus": _less(row, focus, name, progress.study.resamples),
            }
            for name, one in first["metrics"].items()
        },
        "costs": {name: summary([one[name] for one in costs]).mean for name in COSTS},
        "latency": timed.get("rows", {}).get(row.variant),
        "learning_rates": sorted({one.get("learning_rate") or 0.0 for one in row.found.values()}),
        "healing_steps": [one["steps"] for one in healing],
        "healing_peak_bytes": max((one["peak_memory_bytes"] for one in healing), default=None),
        "seconds": {what: summary(taken).mean for what, taken in seconds.items()},
    }


def _less(row: Row, other: Row | None, metric: str, resamples: int) -> dict[str, Any] | None:
    if other is None or other.variant == row.variant:
        return None
    return as_value(difference(row, other, metric, resamples))


def _rates(progress: Progress) -> list[dict[str, Any]]:
    if progress.study.heal_search is None:
        return []
    found = []
    for task in dict.fromkeys(cell.task for cell in progress.asked):
        state = progress.rates(task)
        for variant, loss in state.loss.items():
            by_rate = {f"{rate:g}": loss.get(rate) for rate in state.grid}
            chosen = state.chosen.get(variant)
            found.append({"ground": task, "variant": variant, "loss": by_rate, "chosen": chosen})
    return found


def timed_cells(study: ComparisonRecipe, only: str | None = None) -> list[Cell]:
    """The finished cells of the ground and seed that are timed, whose weights are there."""
    if study.latency is None:
        return []
    progress, own = Progress(study, only), (study.latency.task, study.latency.seed)
    return [
        cell
        for cell in progress.asked
        if (cell.task, cell.seed) == own
        and progress.is_done(cell.id)
        and any(progress.works.folder(cell).glob("*.safetensors"))
    ]
