"""The command that looks into trained models: `analyse`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen

if TYPE_CHECKING:
    from smelt.analyse.run import Analysis


def analyse(
    runs: Annotated[
        list[str], typer.Argument(help="Folders of `smelt train`; those of seeds by their parent.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    text: options.Texts = None,
    micro_batches: Annotated[
        int | None, typer.Option("--micro-batches", help="Gradients that are compared. [16]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Sequences of a micro-batch. [4]")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", help="Tokens of one. [the recipe's]")
    ] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Gradients, α and β, similarity of layers and curves of trained models, as figures and JSON.

    Several runs are put side by side; runs whose recipes differ in the seed only are one variant.
    The text is what each run's own recipe holds out, unless --text says another.

    Example: smelt analyse runs/samoe runs/ar-moe --out analysis
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    from transformers import logging

    from smelt.analyse.ground import AnalysisSettings
    from smelt.analyse.run import analyse as run
    from smelt.settings import check_recipe

    given: dict[str, Any] = {
        "text": text,
        "micro_batches": micro_batches,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "seed": seed,
        "device": device,
    }
    said = {name: value for name, value in given.items() if value not in (None, [])}
    logging.disable_progress_bar()  # transformers' own: ours says enough
    settings = check_recipe(said, AnalysisSettings, origin="settings")
    with screen.watching() as stages:
        found = run(runs, out, settings, stages=stages)
    summary = {"out": str(found.folder), "figures": found.figures, "missing": found.missing}
    screen.result({**summary, **found.value, "seconds": screen.seconds}, _report(found))


def _report(found: "Analysis") -> str:
    from smelt.analyse.page import left_out, table
    from smelt.evaluate.results import markdown

    lines = [markdown(table(found.value))]
    lines += [f"Left out: {line}" for line in left_out(found.value)]
    page = found.folder / ("index.html" if found.missing is None else "analysis.json")
    return "\n".join([*lines, f"Written to {found.folder}; look at {page}"])
