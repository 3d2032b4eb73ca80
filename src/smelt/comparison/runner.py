"""`run_comparison`: every cell in a process of its own, by the runner of studies."""

import sys

from smelt.comparison.schedule import Job, Progress
from smelt.comparison.settings import ComparisonRecipe
from smelt.comparison.works import START
from smelt.errors import RecipeError
from smelt.settings import dump_recipe
from smelt.study.inputs import check_inputs
from smelt.study.records import Records, forget
from smelt.study.runner import OnJob, Ran, carry_out
from smelt.study.store import flat, read

WORK = (sys.executable, "-m", "smelt.comparison.work")
"""The command of a job; the name of its file follows."""

FREE = (
    "output",
    "start",
    "full",
    "source",
    "student",
    "teacher",
    "model",
    "result",
    "stats",
    "folder",
)
"""Last words of settings that may be others when a comparison goes on: where things lie."""
ALSO_FREE = {
    "compress.workers",
    "heal.learning_rate",  # a trial more may have shown another to be the best
    "ask.batch_size",
    "calibration.gradients",  # a new variant may need them
}


def run_comparison(
    study: ComparisonRecipe,
    *,
    only: str | None = None,
    jobs: int = 2,
    threads: int = 1,
    records: Records | None = None,
    on_job: OnJob[Job] = lambda job, what, seconds: None,
) -> Ran:
    """Do all of a comparison that is not done yet.

    What is finished is left as it is; what a kill interrupted goes on; what failed is tried once
    more in each call. A failure stops nothing but what depends on it. A finished model whose
    weights went, and that a new variant is to be made from, is made again.

    Args:
        study: every cell follows from it.
        only: a part, and what it needs.
        jobs: processes at a time.
        threads: of each process.
        records: finished jobs of earlier calls, elsewhere perhaps; those of this one are added.
        on_job: told of every beginning and end.

    Raises:
        RecipeError: no such part, settings of a cell that cannot be, a finished cell that had other
            settings, a comparison that another process is running.
        SmeltError: text or tasks that are not there.
    """
    check_part(study, only)
    progress = Progress(study, only)

    return carry_out(
        progress.store,
        progress.ready,
        lambda job: _words(progress, job),
        lambda job: _settle(progress, job, records),
        begin=lambda: _begin(progress, records),
        jobs=jobs,
        threads=threads,
        on_job=on_job,
    )


def _begin(progress: Progress, records: Records | None) -> None:
    if records is not None:
        records.check_writable()
        records.restore(progress.store)
    check_settings(progress)
    check_inputs(progress.left())
    _forget_lacking(progress)
    if records is not None:
        names = [cell.id for cell in progress.every] + [name for name, _ in progress.trials()]
        records.complete(progress.store, filter(progress.is_done, names))
    dump_recipe(progress.study, progress.store.folder / "comparison.yaml")
    progress.tidy()


def _words(progress: Progress, job: Job) -> list[str]:
    """The command of a job; writes the file that it reads."""
    path = progress.store.beside(job.id, "yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    dump_recipe(job.work, path)
    return [*WORK, str(path)]


def _settle(progress: Progress, job: Job, records: Records | None) -> None:
    """What is left to do when a job has succeeded."""
    if job.work.kind == "full":
        for name in progress.made_of_another(job.id):
            forget(progress.store, name)
    progress.tidy()
    if records is not None and job.work.kind != "start":
        records.keep(progress.store, job.id)


def _forget_lacking(progress: Progress) -> None:
    """Forget finished models that are gone and that what is asked for is still to be made from.

    If one that is then made again turns out to be another (of another start, or on a machine that
    rounds otherwise), what was made from the first is made again too.
    """
    for name in progress.lacking():
        forget(progress.store, name)


def check_part(study: ComparisonRecipe, only: str | None) -> None:
    """A part that is not there is a RecipeError."""
    if only is not None and only not in study.parts:
        raise RecipeError(f"There is no part {only!r}; there are {', '.join(study.parts)}.")


def check_settings(progress: Progress) -> None:
    """A finished cell or trial with other settings than the recipe's is a RecipeError."""
    for name, work in (*progress.works.every(), *progress.trials()):
        before = (read(progress.works.result(name)) or {}).get("settings")
        if before is None:
            continue
        was, now = flat(before), flat(work.model_dump(mode="json"))
        for key in sorted((was.keys() & now.keys()) - ALSO_FREE):
            if key.rpartition(".")[2] not in FREE and was[key] != now[key]:
                where = progress.store.run(name) if name != START else progress.works.start
                raise RecipeError(
                    f"{where} was made with {key} = {was[key]!r}, the recipe says {now[key]!r}. "
                    f"Restore the setting, or remove {where}*, or name another output."
                )
