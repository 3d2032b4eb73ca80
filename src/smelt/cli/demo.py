"""`smelt demo`: the main job on the checkpoint inside the package, from nothing to a table."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, clock, disk_bytes, size
from smelt.errors import CheckpointError
from smelt.outputs import check_new

if TYPE_CHECKING:
    from smelt.evaluate.evaluation import Evaluation

EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "tiny-moe"
"""A small trained MoE, the default of the demo."""

RUNS: dict[str, dict[str, Any]] = {
    "stock-75-percent": {"keep": 0.75},
    "stock-50-percent": {"keep": 0.5},
    "stock-25-percent": {"keep": 0.25},
    "mapped-50-percent": {"keep": 0.5, "form": "mapped"},
    "repaired-50-percent": {"keep": 0.5, "reconstruct": {"steps": 200}},  # fewer than by default
}
"""What is made: a folder's name, and the settings of its compression."""

TEXTS = {"code": "python:held-out:code", "prose": "python:held-out:prose"}
"""What the embedded model was not trained on."""


def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the checkpoints in this new folder.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Another checkpoint than the embedded one.")
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=64, help="Tokens to calibrate on, and of both tests.")
    ] = 8_192,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compress the checkpoint inside the package to 75, 50 and 25 %, and measure what it cost.

    Takes a minute or two, needs no network, and leaves nothing behind without --output.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    if source is None and not (EMBEDDED / "config.json").is_file():
        raise CheckpointError(
            f"{EMBEDDED}: the embedded checkpoint is not there, so this installation is "
            "incomplete. Install smelt again, or name a checkpoint with --source."
        )
    chosen = source or str(EMBEDDED)
    with _folder(output) as folder, screen.watching() as stages:
        made = _compress(chosen, folder, tokens, device or "cpu", screen, stages)
        rows = _measure(chosen, made, tokens // 2, device or "cpu", screen, stages)
    from smelt.evaluate.results import markdown

    kept = f"The checkpoints are in {output}.\n" if output else ""
    screen.result(
        {"rows": rows, "seconds": screen.seconds, "output": output},
        f"\n{markdown(rows)}\nPerplexity and bits per byte on text held out of training; KL is "
        f"the distance from the original's predictions, in nats.\n{kept}"
        f"Done in {clock(screen.seconds)}.\n\n"
        "Next:  smelt compress YOUR-CHECKPOINT OUT --keep 0.5\n"
        "       smelt --help",
    )


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """The folder to work in: the one asked for, or one that is gone afterwards."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="smelt-demo-") as name:
            yield Path(name)
        return
    check_new(output, "folder").mkdir(parents=True)
    yield output


def _compress(
    source: str, folder: Path, tokens: int, device: str, screen: Screen, stages: Any
) -> list[Path]:
    """Calibrate once, then compress by each of the runs."""
    from smelt import api
    from smelt.recipe import DEFAULT_METHODS

    about = api.inspect(source)
    screen.note(
        f"1/3  {Path(source).name}: {len(about.layers)} layers of {about.num_experts[0]} experts, "
        f"{size(about.num_bytes)}. Calibrating it once, on {tokens:,} tokens of the Python library."
    )
    stats = api.calibrate(source, num_tokens=tokens, device=device, stages=stages)
    made = []
    for name, settings in RUNS.items():
        form, fit = settings.get("form", "stock"), settings.get("reconstruct", False)
        repaired = ", each layer repaired" if fit else ""
        screen.note(
            f"2/3  Keeping {settings['keep']:.0%} of the experts: {DEFAULT_METHODS[form]}, {form} "
            f"form{repaired}."
        )
        given = {**settings, "reconstruct": fit, "device": device}
        made.append(api.compress(source, folder / name, stats=stats, stages=stages, **given))
    return made


def _measure(
    source: str, made: Sequence[Path], tokens: int, device: str, screen: Screen, stages: Any
) -> list[dict[str, Any]]:
    """Every checkpoint on code and on prose, held against the original."""
    from smelt import api

    found: dict[str, Evaluation] = {}
    for name, text in TEXTS.items():
        screen.note(f"3/3  Evaluating all of them on {tokens:,} tokens of held-out {name}.")
        found[name] = api.evaluate(
            [source, *made],
            original=source,
            text=[text],
            num_tokens=tokens,
            device=device,
            stages=stages,
        )
    rows = []
    for index, path in enumerate([Path(source), *made]):
        about = api.inspect(path)
        mean = sum(about.num_stored) / len(about.num_stored)
        row: dict[str, Any] = {
            "checkpoint": path.name,
            "experts": round(mean, 1) if mean % 1 else int(mean),
            "MB": round(disk_bytes(path) / 1e6, 2),
        }
        for short, metric in (("ppl", "perplexity"), ("bits/B", "bits per byte"), ("KL", "KL")):
            for name, evaluation in found.items():
                row[f"{short} {name}"] = evaluation.rows()[index].get(metric)
        rows.append(row)
    return rows
