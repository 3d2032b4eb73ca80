"""The command that shows what was done and measured: `report`."""

from pathlib import Path
from typing import Annotated

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, size
from smelt.errors import RecipeError
from smelt.outputs import check_new, write_text

_Files = list[Path] | None


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Anything smelt wrote: checkpoint folders, plans, statistics, analyses, studies, "
            "results, their items and bench files."
        ),
    ] = None,
    results: Annotated[
        _Files, typer.Option("--results", help="A file of `smelt evaluate -o`. Repeat for more.")
    ] = None,
    bench: Annotated[
        _Files, typer.Option("--bench", help="A file of `smelt bench … -o`. Repeat for more.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write, e.g. report.html.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Of the page.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="A table for a paper, on stdout or in the file.")
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Write the results into the model cards of the runs.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """One page of what was done and what it cost: self-contained, works offline from disk.

    Example: smelt report small --results scores.json --bench bench.json -o report.html
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    paths, scores, costs = runs or [], results or [], bench or []
    if not (paths or scores or costs):
        raise RecipeError("Name what to report: folders or files that smelt wrote.")
    if markdown and card:
        raise RecipeError("--markdown and --card are two things: ask for one at a time.")
    if card:
        _cards(paths, scores, screen)
    elif markdown:
        _markdown(paths, scores, costs, output, screen)
    elif output is None:
        raise RecipeError("Name the page to write with -o, e.g. -o report.html.")
    else:
        _page(paths, scores, costs, output, title, screen)


def _page(
    paths: list[Path],
    scores: list[Path],
    costs: list[Path],
    output: Path,
    title: str | None,
    screen: Screen,
) -> None:
    from smelt.report.make import make_report

    page = make_report(paths, output, results=scores, bench=costs, title=title)
    missing = f"\nNot measured: {', '.join(page.missing)}." if page.missing else ""
    text = f"{len(page.sections)} sections, {size(page.num_bytes)}: {page.path}{missing}"
    value = {"page": page.path, "bytes": page.num_bytes, "sections": list(page.sections)}
    screen.result(
        value | {"not_measured": list(page.missing), "seconds": screen.seconds},
        f"{text}\nLook at it in a browser; it loads nothing.",
    )


def _markdown(
    paths: list[Path], scores: list[Path], costs: list[Path], output: Path | None, screen: Screen
) -> None:
    from smelt.report.make import make_markdown

    place = None if output is None else check_new(output)
    table = make_markdown(paths, results=scores, bench=costs)
    if place is not None:
        write_text(place, table)
    screen.result({"markdown": table, "file": place}, table.rstrip() if place is None else "")


def _cards(paths: list[Path], scores: list[Path], screen: Screen) -> None:
    from smelt.report.cards import fill_cards

    filled = fill_cards(paths, scores)
    lines = [
        f"{one.path}: {one.num_results} results in its metadata, and the part “Measured”; "
        f"{'all else is as it was' if one.existed else 'the card is new'}."
        for one in filled
    ]
    value = [{"card": one.path, "results": one.num_results} for one in filled]
    screen.result({"cards": value, "seconds": screen.seconds}, "\n".join(lines))
