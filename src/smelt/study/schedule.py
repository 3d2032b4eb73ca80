"""What can be done next, in order: decided from what is on disk, and from nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smelt.settings import Settings
from smelt.study.cells import Cell, cells, searches
from smelt.study.rates import best, extended
from smelt.study.settings import OWN, Evaluation, StudyRecipe
from smelt.study.store import Store, evaluation_of
from smelt.train.settings import TrainRecipe

Kind = Literal["trial", "train", "evaluate"]


@dataclass(frozen=True)
class Job:
    """One process: a run of training, or the evaluation of one that is trained."""

    id: str  # of the trial or cell
    kind: Kind
    recipe: TrainRecipe
    evaluation: Evaluation

    @property
    def name(self) -> str:
        """Unique among jobs."""
        return f"{self.id} ({self.kind})"


@dataclass(frozen=True)
class Rates:
    """Where the searches of one part stand."""

    grid: list[float]  # by which all of its variants are tried
    nats: dict[str, dict[float, float]]  # per search key, held-out nats by rate; inf: diverged
    chosen: dict[str, float | None]  # complete searches; None: no rate trained


def rates(study: StudyRecipe, store: Store, part: str) -> Rates:
    """The searches of a part, as far as they are done."""
    assert study.search is not None
    wanted = searches(study, part)
    nats: dict[str, dict[float, float]] = {one.key: {} for one in wanted}
    grid = list(study.search.rates)
    while True:
        for one in wanted:
            for rate in grid:
                name, _ = one.trial(study.search, rate)
                found = store.trial_nats(name)
                if found is not None:
                    nats[one.key][rate] = found
        wider = extended(study.search.rates, nats, study.search.extensions)
        if wider == grid:
            break
        grid = wider
    is_done = all(rate in found for found in nats.values() for rate in grid)
    chosen = {key: best(found, grid) for key, found in nats.items()} if is_done else {}
    return Rates(grid, nats, chosen)


def ready(study: StudyRecipe, store: Store, only: str | None = None) -> list[Job]:
    """Jobs whose ground is laid and which are not done, in the order of running.

    Part by part: the trials of its search, then its cells seed by seed, each evaluated as soon as
    it is trained.
    """
    asked = cells(study, only)
    found: list[Job] = []
    chosen: dict[str, float | None] = {}
    for name in study.parts:
        own = [cell for cell in asked if cell.part == name]
        needs = {cell.search for cell in asked} & {one.key for one in searches(study, name)}
        if needs:
            state = rates(study, store, name)
            chosen |= state.chosen
            found += _trials(study, name, state)
        for cell in own:
            found += _of_cell(study, store, cell, chosen)
    return found


def _trials(study: StudyRecipe, part: str, state: Rates) -> Iterator[Job]:
    assert study.search is not None
    for rate in state.grid:
        for one in searches(study, part):
            name, recipe = one.trial(study.search, rate)
            if rate not in state.nats[one.key]:
                yield Job(name, "trial", recipe, Evaluation())


def _of_cell(
    study: StudyRecipe, store: Store, cell: Cell, chosen: dict[str, float | None]
) -> Iterator[Job]:
    rate = chosen.get(cell.search) if cell.search else None
    if cell.search and rate is None:
        return
    recipe, evaluation = cell.at(rate), evaluation_of(study, cell.part)
    if not store.is_trained(cell.id):
        yield Job(cell.id, "train", recipe, evaluation)
    elif store.lacking(cell.id, evaluation):
        yield Job(cell.id, "evaluate", recipe, evaluation)


def all_rates(study: StudyRecipe, store: Store) -> dict[str, float | None]:
    """The learning rate of every search that is complete; None: no rate trained."""
    found: dict[str, float | None] = {}
    for name, part in study.parts.items():
        if part.search == OWN:
            found |= rates(study, store, name).chosen
    return found


def finished(study: StudyRecipe, store: Store) -> Iterator[str]:
    """Names of the trials and cells of which nothing is left to be done."""
    search = study.search
    for name in study.parts if search else ():
        assert search is not None
        for one in searches(study, name):
            for rate in rates(study, store, name).grid:
                trial, _ = one.trial(search, rate)
                if store.trial_nats(trial) is not None:
                    yield trial
    for cell in cells(study):
        evaluation = evaluation_of(study, cell.part)
        if store.is_trained(cell.id) and not store.lacking(cell.id, evaluation):
            yield cell.id


def left(study: StudyRecipe, store: Store, only: str | None = None) -> Iterator[Settings]:
    """The recipes of what is not done: trials that lack, cells and what is asked of them."""
    for job in ready(study, store, only):
        yield job.recipe
    for cell in cells(study, only):
        evaluation = evaluation_of(study, cell.part)
        if not store.is_trained(cell.id) or _is_gone(study, store, cell):
            yield cell.recipe
        if store.lacking(cell.id, evaluation):
            yield evaluation


def gone(study: StudyRecipe, store: Store, only: str | None = None) -> list[str]:
    """Names of trained cells that are still to be evaluated and whose weights are not there.

    Records hold no weights; where more is asked than was recorded, they have to be made again.
    """
    return [cell.id for cell in cells(study, only) if _is_gone(study, store, cell)]


def _is_gone(study: StudyRecipe, store: Store, cell: Cell) -> bool:
    is_there = not store.is_trained(cell.id) or store.has_weights(cell.id)
    return not is_there and bool(store.lacking(cell.id, evaluation_of(study, cell.part)))


def states(study: StudyRecipe, store: Store, asked: Sequence[Cell]) -> dict[str, str]:
    """Where every cell stands: "done", or why it is not."""
    chosen = all_rates(study, store)
    return {cell.id: _state(study, store, cell, chosen) for cell in asked}


def _state(study: StudyRecipe, store: Store, cell: Cell, chosen: Mapping[str, float | None]) -> str:
    lacking = store.lacking(cell.id, evaluation_of(study, cell.part))
    is_trained = store.is_trained(cell.id)
    if is_trained and not lacking:
        return "done"
    reason = store.failure(cell.id)
    if reason is not None:
        return f"failed: {reason}"
    if is_trained:
        again = "; again: its weights are gone" if _is_gone(study, store, cell) else ""
        return f"not evaluated: {', '.join(lacking)}{again}"
    if cell.search is not None and chosen.get(cell.search) is None:
        missing = "no rate trains" if cell.search in chosen else "learning rate not found yet"
        return f"{missing} ({cell.search})"
    steps = store.steps_done(cell.id)
    return f"step {steps} of {cell.recipe.steps}" if steps else "not begun"
