"""`run_study`: jobs in processes of their own, so many at a time, until nothing can be done."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from smelt.errors import RecipeError, SmeltError
from smelt.settings import dump_recipe
from smelt.study.cells import cells, searches
from smelt.study.inputs import check_inputs
from smelt.study.records import Records, forget
from smelt.study.schedule import Job, finished, gone, left, rates, ready
from smelt.study.settings import OWN, StudyRecipe
from smelt.study.store import Store, slim

_GRACE = 20.0
"""Seconds for processes to end, when asked to and when an earlier run of the study was killed."""

WORK = (sys.executable, "-m", "smelt.study.work")
"""The command of a job; its words follow."""


class AnyJob(Protocol):
    """What is run in a process of its own."""

    @property
    def id(self) -> str:
        """Where it lies in the store."""

    @property
    def name(self) -> str:
        """Unique among jobs."""


JobT = TypeVar("JobT", bound=AnyJob)
OnJob = Callable[[JobT, str, float], None]
"""Told the job, "started", "done" or why it failed, and its seconds."""


@dataclass
class Ran:
    """What a call of `run_study` did."""

    done: list[str] = field(default_factory=list)  # names of jobs
    failed: dict[str, str] = field(default_factory=dict)  # and why


@dataclass(frozen=True)
class _Running(Generic[JobT]):
    job: JobT
    process: subprocess.Popen[bytes]
    begin: float


def run_study(
    study: StudyRecipe,
    *,
    only: str | None = None,
    jobs: int = 2,
    threads: int = 1,
    records: Records | None = None,
    on_job: OnJob[Job] = lambda job, what, seconds: None,
) -> Ran:
    """Do all of a study that is not done yet.

    What is finished is left as it is; what a kill interrupted goes on; what failed is tried once
    more in each call. A failure stops nothing but what depends on it. A cell of which something
    more is asked, and whose weights are gone, is trained again.

    Args:
        study: every cell follows from it.
        only: a part; its own cells and the searches it needs.
        jobs: processes at a time.
        threads: of each process.
        records: finished runs of earlier calls, elsewhere perhaps; those of this one are added.
        on_job: told of every beginning and end.

    Raises:
        RecipeError: no such part, a finished cell that had other settings, a study that another
            process is running.
        SmeltError: text or tasks that are not there.
    """
    check_part(study, only)
    store = Store(study.output)

    def begin() -> None:
        if records is not None:
            records.check_writable()
            records.restore(store)
        check_settings(study, store)
        check_inputs(left(study, store, only))
        for name in gone(study, store, only):
            forget(store, name)
        if records is not None:
            records.complete(store, finished(study, store))
        dump_recipe(study, store.folder / "study.yaml")

    def settle(job: Job) -> None:
        is_over = job.kind == "evaluate" or not store.lacking(job.id, job.evaluation)
        if job.kind != "trial" and is_over and study.keep == "last":
            slim(store.run(job.id), is_trial=False)
        if records is not None and (job.kind == "trial" or is_over):
            records.keep(store, job.id)

    return carry_out(
        store,
        lambda: ready(study, store, only),
        lambda job: _words(job, store),
        settle,
        begin=begin,
        jobs=jobs,
        threads=threads,
        on_job=on_job,
    )


def carry_out(
    store: Store,
    next_jobs: Callable[[], list[JobT]],
    words: Callable[[JobT], list[str]],
    settle: Callable[[JobT], None],
    *,
    begin: Callable[[], None] = lambda: None,
    jobs: int = 2,
    threads: int = 1,
    on_job: OnJob[JobT] = lambda job, what, seconds: None,
) -> Ran:
    """Do jobs in processes of their own until none is left; each is tried once.

    Args:
        store: the folder, which nobody else may run in meanwhile.
        next_jobs: those whose ground is laid and which are not done, by what is on disk.
        words: the command of a job; writes the file that it reads.
        settle: what is left to do when a job has succeeded.
        begin: called once the folder is ours.
        jobs: processes at a time.
        threads: of each process.
        on_job: told of every beginning and end.

    Raises:
        RecipeError: another process is running in the folder.
    """
    ran = Ran()
    tried: set[str] = set()
    pool: list[_Running[JobT]] = []
    with _begun(store, begin) as lock:
        try:
            while True:
                for job in next_jobs() if len(pool) < jobs else ():
                    if len(pool) < jobs and job.name not in tried:
                        tried.add(job.name)
                        pool.append(_start(job, words(job), store, threads, lock))
                        on_job(job, "started", 0.0)
                if not pool:
                    return ran
                for one in _ended(pool):
                    pool.remove(one)
                    _settle(one, store, ran, settle, on_job)
        finally:
            _stop(pool)


@contextlib.contextmanager
def _begun(store: Store, begin: Callable[[], None]) -> Iterator[int]:
    """Within: the folder is ours, and `begin` has been called; what it refuses leaves no folder."""
    made = [one for one in (store.folder, *store.folder.parents) if not one.exists()]
    store.folder.mkdir(parents=True, exist_ok=True)
    with _alone(store) as lock:
        try:
            begin()
        except SmeltError:
            if made:
                shutil.rmtree(store.folder)
            for folder in made[1:]:
                with contextlib.suppress(OSError):  # another process has put something there
                    folder.rmdir()
            raise
        yield lock


def check_part(study: StudyRecipe, only: str | None) -> None:
    """A part that is not there is a RecipeError."""
    if only is not None and only not in study.parts:
        raise RecipeError(f"There is no part {only!r}; there are {', '.join(study.parts)}.")


def check_settings(study: StudyRecipe, store: Store) -> None:
    """A begun or finished cell with other settings than the study's is a RecipeError.

    The learning rate is not compared: a trial more may have shown another to be the best, and every
    cell says its own.
    """
    for cell in cells(study):
        store.check(cell.id, cell.recipe, but={"learning_rate"})
    for name, part in study.parts.items():
        if part.search == OWN and study.search is not None:
            for rate in rates(study, store, name).grid:
                for one in searches(study, name):
                    store.check(*one.trial(study.search, rate))


def _words(job: Job, store: Store) -> list[str]:
    recipe = job.recipe.model_copy(update={"output": str(store.run(job.id))})
    path = store.beside(job.id, "yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    dump_recipe(recipe, path)
    words = [*WORK, job.kind, str(path)]
    if job.kind == "evaluate":
        words.append(json.dumps(job.evaluation.model_dump(mode="json")))
    return words


def _start(job: JobT, words: list[str], store: Store, threads: int, lock: int) -> _Running[JobT]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    with store.beside(job.id, "log").open("ab") as log:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,  # closed by our end, whatever it is
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C reaches us, and we tell them
        )
    return _Running(job, process, time.perf_counter())


def _ended(pool: list[_Running[JobT]]) -> list[_Running[JobT]]:
    """Wait until one has ended."""
    while True:
        ended = [one for one in pool if one.process.poll() is not None]
        if ended:
            return ended
        time.sleep(0.05)


def _settle(
    one: _Running[JobT],
    store: Store,
    ran: Ran,
    settle: Callable[[JobT], None],
    on_job: OnJob[JobT],
) -> None:
    job, code = one.job, one.process.returncode
    assert one.process.stdin is not None
    one.process.stdin.close()
    seconds = time.perf_counter() - one.begin
    if code == 0:
        store.forgive(job.id)
        ran.done.append(job.name)
        settle(job)
        on_job(job, "done", seconds)
        return
    log = store.beside(job.id, "log")
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = lines[-1].removeprefix("smelt: error: ") if lines else "it said nothing"
    message = said if code > 0 else f"ended by signal {-code}"
    store.fail(job.id, message)
    ran.failed[job.name] = message
    on_job(job, message, seconds)


def _stop(pool: list[_Running[JobT]]) -> None:
    """End what still runs; it goes on from its last checkpoint the next time."""
    for one in pool:
        one.process.terminate()
    for one in pool:
        try:
            one.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        assert one.process.stdin is not None
        one.process.stdin.close()


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[int]:
    """Within: no other process runs this study. The lock is held by our processes too."""
    file: Any
    with (store.folder / "lock").open("ab") as file:
        until = time.perf_counter() + _GRACE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.perf_counter() > until:
                    raise RecipeError(
                        f"{store.folder}: another process runs this study. Wait for it, or stop it."
                    ) from None
                time.sleep(0.2)
        yield file.fileno()
