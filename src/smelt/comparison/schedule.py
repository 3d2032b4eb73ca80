"""What can be done next, in order, and which weights nothing needs any more: by what is on disk."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smelt.comparison.cells import Cell, cells, needs_search, searched
from smelt.comparison.settings import FULL, ComparisonRecipe
from smelt.comparison.work import outcomes_file
from smelt.comparison.work_settings import Work
from smelt.comparison.works import START, Works
from smelt.study.rates import best, extended
from smelt.study.store import Store, read


@dataclass(frozen=True)
class Job:
    """One process."""

    id: str
    work: Work

    @property
    def name(self) -> str:
        """Unique among jobs."""
        return self.id


@dataclass(frozen=True)
class Rates:
    """Where the searches on one ground stand."""

    grid: list[float]  # by which all searched variants are tried
    loss: dict[str, dict[float, float]]  # per variant, by rate: what is least is best
    chosen: dict[str, float | None]  # once all are done; None: no rate trained


class Progress:
    """A comparison and what of it is on disk.

    Args:
        study: whose cells.
        only: a part; None: all.
    """

    def __init__(self, study: ComparisonRecipe, only: str | None = None) -> None:
        self.study = study
        self.store = Store(study.output)
        self.works = Works(study, self.store)
        self.asked = cells(study, only)
        self.every = cells(study)

    def is_done(self, name: str) -> bool:
        """Whether a cell, a trial or the start is finished."""
        return bool((read(self.works.result(name)) or {}).get("is_done"))

    def found(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured on a finished cell."""
        found = read(self.works.result(cell.id))
        return found if found and found.get("is_done") else None

    def made_of_another(self, full: str) -> list[str]:
        """Variants of a finished full model's ground and seed that were made from another one."""
        mine = (read(self.works.result(full)) or {}).get("full")
        own = [cell.id for cell in self.every if cell.full.id == full and cell.id != full]
        found = {name: (read(self.works.result(name)) or {}).get("full") for name in own}
        return [
            name for name, other in found.items() if None not in (mine, other) and mine != other
        ]

    def values(self, cell: Cell) -> dict[str, dict[str, float]]:
        """By metric, the value of every unit of a finished cell."""
        found = read(outcomes_file(self.works.result(cell.id))) or {}
        values: dict[str, dict[str, float]] = found.get("values", {})
        return values

    # --- rates -----------------------------------------------------------------------------------

    def rates(self, task: str) -> Rates:
        """The searches on a ground, as far as they are done."""
        search = self.study.heal_search
        assert search is not None
        wanted = searched(self.study, task)
        loss: dict[str, dict[float, float]] = {name: {} for name in wanted}
        grid = list(search.rates)
        while True:
            for variant in wanted:
                for rate in grid:
                    if rate in loss[variant]:
                        continue
                    name, _ = self.works.trial(task, variant, rate)
                    found = read(self.works.result(name)) or {}
                    if found.get("is_done"):
                        loss[variant][rate] = found.get("loss", math.inf)
            wider = extended(search.rates, loss, search.extensions)
            if wider == grid:
                break
            grid = wider
        is_done = all(rate in found for found in loss.values() for rate in grid)
        chosen = {name: best(found, grid) for name, found in loss.items()} if is_done else {}
        return Rates(grid, loss, chosen)

    def _after(self, cell: Cell) -> Cell | None:
        after = self.study.resolve(cell.variant).after
        return None if after is None else Cell(cell.task, cell.seed, after)

    # --- jobs ------------------------------------------------------------------------------------

    def ready(self) -> list[Job]:
        """Jobs whose ground is laid and which are not done, in the order of running.

        The start, if a model is to be made from it; then cell by cell: what comes before the full
        model, it, the search its ground needs, the variants.
        """
        found: dict[str, Job] = {}
        known: dict[str, Rates] = {}
        for cell in self.asked:
            for job in self._of_cell(cell, known):
                found.setdefault(job.id, job)
        jobs, begin = list(found.values()), self.works.beginning()
        others = [job for job in jobs if job.work.kind not in ("start", "full")]
        if begin is None or self.is_done(START) or len(others) == len(jobs):
            return jobs
        return [Job(START, begin), *others]

    def left(self) -> list[Work]:
        """The work of what is not done or is to be made again, what it begins with before it."""
        names = {cell.id for cell in self.asked if not self.is_done(cell.id)} | self.lacking()
        own = [work for name, work in self.works.every() if name in names]
        return [*(job.work for job in self.ready()), *own]

    def _of_cell(self, cell: Cell, known: dict[str, Rates]) -> list[Job]:
        if self.is_done(cell.id):
            return []
        if cell.variant == FULL:
            return [self._full(cell)]
        if not self.is_done(cell.full.id):
            return []
        after = self._after(cell)
        if after is not None and not self.is_done(after.id):
            return []
        rate = None
        search = needs_search(self.study, cell.variant)
        if search is not None:
            if cell.task not in known:
                known[cell.task] = self.rates(cell.task)
            rates = known[cell.task]
            if not rates.chosen:
                return self._trials(cell.task, rates)
            rate = rates.chosen[search]
            if rate is None:
                return []
        return [Job(cell.id, self.works.variant(cell, rate))]

    def _full(self, cell: Cell) -> Job:
        """The full model, or first what it is fine-tuned from."""
        before = self.works.before(cell.task)
        if before is not None and not self.is_done(before[0]):
            return Job(*before)
        return Job(cell.id, self.works.full(cell))

    def _trials(self, task: str, rates: Rates) -> list[Job]:
        """The trials that lack, and before them the models that they are made from."""
        search = self.study.heal_search
        assert search is not None
        full = Cell(task, search.seed, FULL)
        if not self.is_done(full.id):
            return [self._full(full)]
        jobs = []
        for rate in rates.grid:
            for variant, found in rates.loss.items():
                after = self._after(Cell(task, search.seed, variant))
                if rate not in found and (after is None or self.is_done(after.id)):
                    jobs.append(Job(*self.works.trial(task, variant, rate)))
        return jobs

    def trials(self) -> list[tuple[str, Work]]:
        """Every trial of every ground, as far as its grid is known."""
        if self.study.heal_search is None:
            return []
        return [
            self.works.trial(task, variant, rate)
            for task in self.study.tasks
            for variant in searched(self.study, task)
            for rate in self.rates(task).grid
        ]

    # --- states ----------------------------------------------------------------------------------

    def states(self, asked: Sequence[Cell] | None = None) -> dict[str, str]:
        """Where every cell stands: "done", or why it is not."""
        known: dict[str, Rates] = {}
        return {cell.id: self._state(cell, known) for cell in asked or self.asked}

    def _state(self, cell: Cell, known: dict[str, Rates]) -> str:
        if self.is_done(cell.id):
            return "done"
        reason = self.store.failure(cell.id)
        if reason is not None:
            return f"failed: {reason}"
        before = self.works.before(cell.task)
        waits = [cell.full.id] if cell.variant != FULL else [before[0]] if before else []
        after = self._after(cell)
        for other in (*waits, after.id) if after else waits:
            if not self.is_done(other):
                return f"waits for {other}"
        search = needs_search(self.study, cell.variant)
        if search is not None:
            if cell.task not in known:
                known[cell.task] = self.rates(cell.task)
            chosen = known[cell.task].chosen
            if chosen.get(search) is None:
                what = "no rate trains" if search in chosen else "learning rate not found yet"
                return f"{what} ({cell.task}/search/{search})"
        return "not begun"

    # --- weights ---------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Remove weights and statistics that no cell of the comparison needs any more."""
        if self.study.keep == "all":
            return
        for cell in self.every:
            if not self.is_done(cell.id) or self._is_timed(cell) or self.is_built_upon(cell):
                continue
            folder = self.store.run(cell.id)
            for path in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
                path.unlink()
            if cell.variant == FULL:
                for path in Path(self.works.stats(cell)).glob("*"):
                    path.unlink()

    def _is_timed(self, cell: Cell) -> bool:
        timed = self.study.latency
        return timed is not None and (cell.task, cell.seed) == (timed.task, timed.seed)

    def lacking(self) -> set[str]:
        """Finished models that are gone, and that what is asked for is still to be made from."""
        gone: set[str] = set()
        while more := {
            cell.id
            for cell in self.every
            if cell.id not in gone
            and self.is_done(cell.id)
            and not self._is_whole(cell)
            and self.is_built_upon(cell, self.asked, gone)
        }:  # what is made again may be made from another one that is gone
            gone |= more
        return gone

    def _is_whole(self, cell: Cell) -> bool:
        """Whether a finished model has its weights and, a full one, its statistics."""
        if not any(self.works.folder(cell).glob("*.safetensors")):
            return False
        return cell.variant != FULL or any(Path(self.works.stats(cell)).glob("*"))

    def is_built_upon(
        self, cell: Cell, asked: Sequence[Cell] | None = None, again: Container[str] = ()
    ) -> bool:
        """Whether cells or trials that are made from this one are not done.

        Args:
            asked: cells that count, and the trials of their rates; None: all.
            again: what is done and to be made again.
        """
        asked = self.every if asked is None else asked

        def is_left(one: Cell) -> bool:
            return not self.is_done(one.id) or one.id in again

        same = [one for one in asked if (one.task, one.seed) == (cell.task, cell.seed)]
        for one in same:
            if cell in (one.full, self._after(one)) and one != cell and is_left(one):
                return True
        search = self.study.heal_search
        if search is None or cell.seed != search.seed or not searched(self.study, cell.task):
            return False
        searching = [one for one in asked if needs_search(self.study, one.variant) is not None]
        left = [one for one in searching if one.task == cell.task and is_left(one)]
        return bool(left) and not self.rates(cell.task).chosen
