"""`run_operators`: models, statistics and groups of cells, each in a process of its own."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smelt.errors import RecipeError
from smelt.operators.settings import Asked, OperatorsRecipe, asked
from smelt.operators.work import Work, check_same
from smelt.settings import Settings, dump_recipe, expand_environment, find_recipe, load_recipe
from smelt.study.inputs import check_inputs
from smelt.study.records import Records
from smelt.study.runner import WORK as TRAIN
from smelt.study.runner import OnJob, Ran, carry_out
from smelt.study.store import Store, flat, read
from smelt.train.settings import TrainRecipe

WORK = (sys.executable, "-m", "smelt.operators.work")
"""The command of a job; the name of its file follows."""


@dataclass(frozen=True)
class Job:
    """What is run in a process of its own."""

    id: str
    words: Callable[[], list[str]]

    @property
    def name(self) -> str:
        return self.id


@dataclass(frozen=True)
class Progress:
    """A study on disk: what is done of it, and what can be done next."""

    study: OperatorsRecipe
    only: str | None = None

    @property
    def store(self) -> Store:
        return Store(self.study.output)

    def model(self, name: str) -> Path:
        """The folder of a model: the one that is named, or where it is trained."""
        given = self.study.models[name]
        if not _is_recipe(given):
            return Path(expand_environment(given)).expanduser()
        return self.store.run(f"models/{name}")

    def ready(self) -> list[Job]:
        """Jobs whose ground is laid and which are not done."""
        jobs: dict[str, Job] = {}
        for one in asked(self.study, self.only):
            if not self.lacking(one):
                continue
            job = self._next(one)
            jobs.setdefault(job.id, job)
        return list(jobs.values())

    def lacking(self, one: Asked) -> list[str]:
        """The cells of a group that are not done."""
        rows = (read(self.store.beside(one.group.id, "json")) or {}).get("rows", {})
        return [
            cell_name(*cell)
            for cell, tasks in one.cells.items()
            if "nats" not in (row := rows.get(cell_name(*cell), {}))
            or any(task not in row.get("tasks", {}) for task in tasks)
        ]

    def left(self) -> list[Settings]:
        """The recipes of what is not done: models to be trained, then the cells."""
        lacking = [one for one in asked(self.study, self.only) if self.lacking(one)]
        names = dict.fromkeys(one.group.model for one in lacking)
        models = [self._training(name) for name in names if self._is_to_be_trained(name)]
        return [*models, *(self._work(one, "cells", Path()) for one in lacking)]

    def measured_on(self, name: str) -> dict[str, Path]:
        """Fingerprints of the checkpoints that a model's cells are of, each with a file."""
        found: dict[str, Path] = {}
        for one in asked(self.study):
            path = self.store.beside(one.group.id, "json")
            if one.group.model == name and (cells := read(path)):
                found.setdefault(cells["original"]["fingerprint"], path)
        return found

    def _next(self, one: Asked) -> Job:
        """What a group waits for: its model, its statistics, or nothing but itself."""
        group, store = one.group, self.store
        if self._is_to_be_trained(group.model):
            return Job(f"models/{group.model}", lambda: self._train(group.model))
        stats = store.run(group.statistics + ".stats")
        if not (stats / "stats.json").is_file():
            job = f"{group.statistics}/statistics"
            return Job(job, lambda: self._words(job, self._work(one, "statistics", stats)))
        return Job(group.id, lambda: self._words(group.id, self._work(one, "cells", stats)))

    def _work(self, one: Asked, kind: Any, stats: Path) -> Work:
        group, study = one.group, self.study
        calibration = study.calibration(group)
        shared = {
            "kind": kind,
            "model": str(self.model(group.model)),
            "stats": str(stats),
            "result": str(self.store.beside(group.id, "json")),
            "calibration": calibration,
            "fingerprint": next(iter(self.measured_on(group.model)), None),
        }
        if kind == "statistics":
            return Work(**shared)
        return Work(
            **shared,
            held_out=study.held_out,
            cells={cell_name(*cell): study.compression(group, *cell) for cell in one.cells},
            tasks={cell_name(*cell): tasks for cell, tasks in one.cells.items()},
            task_limit=study.task_limit,
        )

    def _words(self, job: str, work: Work) -> list[str]:
        path = self.store.beside(job, "yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        dump_recipe(work, path)
        return [*WORK, str(path)]

    def _is_to_be_trained(self, name: str) -> bool:
        given = self.study.models[name]
        return _is_recipe(given) and not (self.model(name) / "config.json").is_file()

    def _training(self, name: str) -> TrainRecipe:
        recipe = load_recipe(find_recipe(self.study.models[name], "train"), TrainRecipe)
        return recipe.model_copy(update={"output": str(self.model(name))})

    def _train(self, name: str) -> list[str]:
        path = self.store.beside(f"models/{name}", "yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        dump_recipe(self._training(name), path)
        return [*TRAIN, "train", str(path)]


def run_operators(
    study: OperatorsRecipe,
    *,
    only: str | None = None,
    jobs: int = 2,
    threads: int = 1,
    records: Records | None = None,
    on_job: OnJob[Job] = lambda job, what, seconds: None,
) -> Ran:
    """Do all of a study that is not done yet; what is done stays, cell by cell.

    Args:
        only: a part.
        jobs: processes at a time.
        threads: of each process.
        records: finished groups of earlier calls, elsewhere perhaps; those of this one are added.
        on_job: told of every beginning and end.

    Raises:
        RecipeError: no such part, a variant that cannot be, a model's folder without a checkpoint,
            a finished cell that had other settings or is of another checkpoint, a study that
            another process is running.
        SmeltError: text or tasks that are not there.
    """
    progress = Progress(study, only)
    wanted = asked(study, only)
    for one in wanted:
        for cell in one.cells:
            study.compression(one.group, *cell)
    _check_models(progress, wanted)

    def begin() -> None:
        if records is not None:
            records.check_writable()
            records.restore(progress.store)
        check_done(progress, wanted)
        check_inputs(progress.left())
        if records is not None:
            records.complete(progress.store, [one.group.id for one in wanted])
        dump_recipe(study, progress.store.folder / "operators.yaml")

    def settle(job: Job) -> None:
        if records is not None and job.id in {one.group.id for one in wanted}:
            records.keep(progress.store, job.id)

    return carry_out(
        progress.store,
        progress.ready,
        lambda job: job.words(),
        settle,
        begin=begin,
        jobs=jobs,
        threads=threads,
        on_job=on_job,
    )


def cell_name(variant: str, fit: str) -> str:
    """A cell's name among those of its group."""
    return f"{variant}, {fit}"


def check_done(progress: Progress, wanted: list[Asked]) -> None:
    """What is done must be what the recipe asks for.

    Raises:
        RecipeError: a finished cell with other settings, or of another checkpoint than its model's
            others or the folder of its model.
    """
    for name in dict.fromkeys(one.group.model for one in wanted):
        _check_origin(progress, name)
    for one in wanted:
        _check_settings(progress, one)


def _check_origin(progress: Progress, name: str) -> None:
    from smelt.checkpoint.source import Checkpoint

    measured, folder = progress.measured_on(name), progress.model(name)
    if len(measured) > 1:
        first, second, *_ = measured.values()
        raise RecipeError(
            f"models.{name}: {first} and {second} hold cells of two checkpoints. Remove the files "
            "of one, or name another output."
        )
    if measured and (folder / "config.json").is_file():
        check_same(Checkpoint.open(folder), next(iter(measured)))


def _check_settings(progress: Progress, one: Asked) -> None:
    path = progress.store.beside(one.group.id, "json")
    rows = (read(path) or {}).get("rows", {})
    for cell in one.cells:
        before = rows.get(cell_name(*cell), {}).get("recipe")
        if before is None:
            continue
        now = progress.study.compression(one.group, *cell).model_dump(
            mode="json", exclude={"source", "output"}
        )
        was, new = flat(before), flat(now)
        for key in sorted(was.keys() & new.keys()):
            if was[key] != new[key]:
                raise RecipeError(
                    f"{path}: {cell_name(*cell)} was made with {key} = {was[key]!r}, the recipe "
                    f"says {new[key]!r}. Restore the setting, or remove that file, or name another "
                    "output."
                )


def _check_models(progress: Progress, wanted: list[Asked]) -> None:
    """A folder named as a model that holds no checkpoint is a RecipeError before any job runs."""
    for name in dict.fromkeys(one.group.model for one in wanted):
        given, folder = progress.study.models[name], progress.model(name)
        if not _is_recipe(given) and not (folder / "config.json").is_file():
            raise RecipeError(
                f"models.{name} = {given}: not a checkpoint folder. Name one with config.json in "
                "it, or a training recipe (a name that ends with .yaml)."
            )


def _is_recipe(model: str) -> bool:
    return model.endswith(".yaml")
