"""`smelt study` of a comparison: its cells, where they stand, and its tables."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from smelt.cli.screen import Screen, Stopped, clock

if TYPE_CHECKING:
    from smelt.comparison.settings import ComparisonRecipe
    from smelt.study.records import Records
    from smelt.study.runner import Ran


def compare(
    screen: Screen,
    read: "ComparisonRecipe",
    only: str | None,
    *,
    jobs: int,
    threads: int,
    table: bool,
    latency: bool,
    dry_run: bool,
    records: "Records | None" = None,
) -> None:
    """Run what is not done, then show the tables; or one of the two; or list the jobs."""
    from smelt.comparison.runner import check_part, check_settings, run_comparison
    from smelt.comparison.schedule import Progress

    check_part(read, only)
    if records is not None and (dry_run or table):
        records.restore(Progress(read).store)
    if dry_run:
        check_settings(Progress(read, only))
        _list(screen, read, only)
        return
    failed: dict[str, str] = {}
    if not table:
        failed = told(
            screen,
            read.output,
            lambda on_job: run_comparison(
                read, only=only, jobs=jobs, threads=threads, records=records, on_job=on_job
            ),
        )
    _tables(screen, read, only, threads, records, latency=latency)
    if failed:
        raise typer.Exit(1)


def told(
    screen: Screen, output: str, run: Callable[[Callable[[Any, str, float], None]], "Ran"]
) -> dict[str, str]:
    """Run jobs and tell of each; names of those that failed, and why. A stop says what is kept."""

    def on_job(job: Any, what: str, seconds: float) -> None:
        after = "" if what == "started" else f" after {clock(seconds)}"
        screen.note(f"{job.id}: {what}{after}")

    try:
        return run(on_job).failed
    except Stopped as stopped:
        stopped.kept = Path(output)
        raise


def _list(screen: Screen, read: "ComparisonRecipe", only: str | None) -> None:
    from smelt.comparison.listing import listing
    from smelt.evaluate.results import markdown

    rows = listing(read, only)
    left = sum(row["state"] != "done" for row in rows)
    screen.result(rows, f"{markdown(rows)}\n{len(rows)} jobs, of which {left} are left.")


def _tables(
    screen: Screen,
    read: "ComparisonRecipe",
    only: str | None,
    threads: int,
    records: "Records | None",
    *,
    latency: bool,
) -> None:
    from smelt.comparison.markdown import report
    from smelt.comparison.schedule import Progress
    from smelt.comparison.tables import results

    if latency:
        from transformers import logging

        from smelt.comparison.latency import measure_latency

        logging.disable_progress_bar()  # transformers' own bars: ours say enough
        with screen.watching() as stages:
            measure_latency(read, only, threads=threads, progress=stages("measuring"))
        if records is not None:
            records.keep(Progress(read).store, "latency.json")
    found = results(read, only)
    screen.result(found, report(found))
