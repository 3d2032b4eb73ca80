"""The command that runs a study and shows its tables."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, Stopped, clock
from smelt.errors import RecipeError

if TYPE_CHECKING:
    from smelt.study.records import Records
    from smelt.study.settings import StudyRecipe


def study(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A study of training or, with kind: comparison or operators, of compression: a "
            "recipe file, or the name of one that comes along (samoe, mc-smoe, operators, tiny)."
        ),
    ],
    only: Annotated[str | None, typer.Option("--only", help="One part of it.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Cells at a time.")] = 2,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of each cell.")] = 1,
    table: Annotated[
        bool, typer.Option("--table", help="Train nothing: show the tables of what is done.")
    ] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="With --table: measure decode steps, interleaved.")
    ] = False,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            help="With --table, of a comparison: measure forwards, steps and memory, interleaved.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: list every cell and where it stands.")
    ] = False,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records",
            help="A file of the figures of finished runs: those in it count as done, those of "
            "this call are added. Weights are not in it.",
        ),
    ] = None,
    settings: options.Sets = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the cells of a study, each in a process of its own; what is done already is kept.

    Example: smelt study recipes/study/tiny.yaml --jobs 2
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    os.environ.setdefault("TQDM_DISABLE", "1")
    from smelt.settings import find_recipe, load_recipe, read_values
    from smelt.study.records import Records
    from smelt.study.settings import StudyRecipe
    from smelt.study.store import Store

    recipe = find_recipe(recipe, "study")
    kept = None if records is None else Records(records)
    how: dict[str, Any] = {"jobs": jobs, "threads": threads, "table": table}
    how |= {"dry_run": dry_run, "records": kept}
    kind = read_values(recipe, StudyRecipe).get("kind")
    if kind == "operators":
        from smelt.cli.operating import operate
        from smelt.operators.settings import OperatorsRecipe

        if decode or latency:
            raise RecipeError("--decode and --latency are not of a study of operators. Drop them.")
        operate(screen, load_recipe(recipe, OperatorsRecipe, settings or ()), only, **how)
        return
    if kind is not None:
        from smelt.cli.comparing import compare
        from smelt.comparison.settings import ComparisonRecipe

        if decode:
            raise RecipeError("--decode is of studies of training; a comparison has --latency.")
        read_comparison = load_recipe(recipe, ComparisonRecipe, settings or ())
        compare(screen, read_comparison, only, latency=latency, **how)
        return
    if latency:
        raise RecipeError("--latency is of comparisons; a study of training has --decode.")
    read = load_recipe(recipe, StudyRecipe, settings or ())
    if kept is not None and (dry_run or table):
        kept.restore(Store(read.output))
    if dry_run:
        _list(screen, read, only)
        return
    failed: dict[str, str] = {}
    if not table:
        failed = _run(screen, read, only, jobs, threads, kept)
    _tables(screen, read, only, kept, decode=decode)
    if failed:
        raise typer.Exit(1)


def _run(
    screen: Screen,
    read: "StudyRecipe",
    only: str | None,
    jobs: int,
    threads: int,
    records: "Records | None",
) -> dict[str, str]:
    from smelt.study.runner import run_study
    from smelt.study.schedule import Job

    def on_job(job: Job, what: str, seconds: float) -> None:
        after = "" if what == "started" else f" after {clock(seconds)}"
        kind = "" if job.kind == "train" else f" ({job.kind})"
        screen.note(f"{job.id}{kind}: {what}{after}")

    try:
        return run_study(
            read, only=only, jobs=jobs, threads=threads, records=records, on_job=on_job
        ).failed
    except Stopped as stopped:
        stopped.kept = Path(read.output)
        raise


def _list(screen: Screen, read: "StudyRecipe", only: str | None) -> None:
    from smelt.evaluate.results import markdown
    from smelt.study.listing import listing
    from smelt.study.runner import check_part, check_settings
    from smelt.study.store import Store

    check_part(read, only)
    check_settings(read, Store(read.output))
    rows = listing(read, only)
    tokens = sum(row["tokens"] for row in rows)
    left = sum(row["tokens"] for row in rows if row["state"] != "done")
    screen.result(
        rows, f"{markdown(rows)}\n{len(rows)} runs, {tokens:,} tokens, of which {left:,} are left."
    )


def _tables(
    screen: Screen,
    read: "StudyRecipe",
    only: str | None,
    records: "Records | None",
    *,
    decode: bool,
) -> None:
    from smelt.study.markdown import report
    from smelt.study.runner import check_part
    from smelt.study.store import Store
    from smelt.study.tables import results

    check_part(read, only)
    if decode:
        from transformers import logging

        from smelt.study.decode import measure_decode

        logging.disable_progress_bar()  # transformers' own bars: ours say enough
        with screen.watching() as stages:
            measure_decode(read, only, progress=stages("decoding"))
        if records is not None:
            records.keep(Store(read.output), "decode.json")
    found = results(read, only)
    screen.result(found, report(found))
