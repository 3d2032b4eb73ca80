"""Every job of a comparison as a line: what it is and where it stands."""

from typing import Any

from smelt.comparison.cells import Cell, searched
from smelt.comparison.schedule import Progress
from smelt.comparison.settings import FULL, ComparisonRecipe
from smelt.comparison.work_settings import Work
from smelt.comparison.works import START


def listing(study: ComparisonRecipe, only: str | None = None) -> list[dict[str, Any]]:
    """The start, trials and cells in the order of running, as rows of a table.

    The start, and what comes before a ground's full models, only if it is done or needed.
    """
    progress = Progress(study, only)
    states, rows = progress.states(), []
    states |= dict.fromkeys(states.keys() & progress.lacking(), "again: its weights are gone")
    begin = progress.works.beginning()
    unmade = [cell for cell in progress.asked if states.get(cell.full.id) != "done"]
    if begin is not None and (unmade or progress.is_done(START)):
        rows.append(_row(START, begin, _state(progress, START)))
    begun: set[str] = set()
    tried: set[str] = set()
    for cell in progress.asked:
        before = progress.works.before(cell.task)
        if before is not None and before[0] not in begun:
            is_needed = any(one.task == cell.task for one in unmade)
            if is_needed or progress.is_done(before[0]):
                rows.append(_row(*before, _state(progress, before[0])))
                begun.add(before[0])
        if cell.variant != FULL and cell.task not in tried:
            tried.add(cell.task)
            rows += _trials(progress, cell.task)
        rows.append(_row(cell.id, _work(progress, cell), states[cell.id]))
    return rows


def _work(progress: Progress, cell: Cell) -> Work:
    works = progress.works
    return works.full(cell) if cell.variant == FULL else works.variant(cell)


def _trials(progress: Progress, task: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if progress.study.heal_search is None:
        return rows
    for rate in progress.rates(task).grid:
        for variant in searched(progress.study, task):
            name, work = progress.works.trial(task, variant, rate)
            rows.append(_row(name, work, _state(progress, name)))
    return rows


def _state(progress: Progress, name: str) -> str:
    return "done" if progress.is_done(name) else progress.store.failure(name) or "not begun"


def _row(name: str, work: Work, state: str) -> dict[str, Any]:
    row: dict[str, Any] = {"job": name, "steps": None, "compress": None, "heal": None}
    if work.train is not None:
        row["steps"] = work.train.steps
    if work.compress is not None:
        kept = work.compress.experts or f"{work.compress.keep:g}"
        row["compress"] = f"{work.compress.method}, {kept}"
    if work.heal is not None:
        row["steps"] = work.heal.steps
        parts = [f"{work.heal.distill.cross_entropy:g} CE + {work.heal.distill.weight:g} KL"]
        if work.heal.decompose is not None:
            parts.append(f"rank {work.heal.decompose.rank}")
        row["heal"] = ", ".join(parts)
    row["measured on"] = None if work.ask is None else work.ask.part
    return row | {"state": state}
