"""`smelt study` of operators: its cells, where they stand, and its tables."""

from typing import TYPE_CHECKING, Any

import typer

from smelt.cli.comparing import told
from smelt.cli.screen import Screen

if TYPE_CHECKING:
    from smelt.operators.runner import Progress
    from smelt.operators.settings import OperatorsRecipe
    from smelt.study.records import Records


def operate(
    screen: Screen,
    read: "OperatorsRecipe",
    only: str | None,
    *,
    jobs: int,
    threads: int,
    table: bool,
    dry_run: bool,
    records: "Records | None" = None,
) -> None:
    """Run what is not done, then show the tables; or one of the two; or list the cells."""
    from smelt.operators.runner import Progress, check_done, run_operators
    from smelt.operators.settings import asked
    from smelt.operators.tables import report, results

    progress = Progress(read, only)
    wanted = asked(read, only)
    if records is not None and (dry_run or table):
        records.restore(progress.store)
    if dry_run or table:
        check_done(progress, wanted)
    if dry_run:
        _list(screen, progress)
        return
    failed: dict[str, str] = {}
    if not table:
        failed = told(
            screen,
            read.output,
            lambda on_job: run_operators(
                read, only=only, jobs=jobs, threads=threads, records=records, on_job=on_job
            ),
        )
    rows = results(read, only)
    left = sum(len(progress.lacking(one)) for one in wanted)
    screen.result(rows, report(read, rows, left))
    if failed:
        raise typer.Exit(1)


def _list(screen: Screen, progress: "Progress") -> None:
    from smelt.evaluate.results import markdown
    from smelt.operators.settings import asked

    rows: list[dict[str, Any]] = []
    for one in asked(progress.study, progress.only):
        left = len(progress.lacking(one))
        rows.append({"group": one.group.id, "cells": len(one.cells), "left": left})
    cells, left = (sum(row[key] for row in rows) for key in ("cells", "left"))
    screen.result(rows, f"{markdown(rows)}\n{cells} cells, of which {left} are left.")
