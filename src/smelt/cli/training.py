"""The command that trains a small MoE."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, Stopped, clock, number

if TYPE_CHECKING:
    from smelt.train.settings import TrainRecipe


def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe file, or the name of one that comes along, such as samoe-tiny."
        ),
    ],
    settings: options.Sets = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a small MoE of any family transformers knows, and save it as an ordinary checkpoint.

    A recipe with start goes on from a checkpoint; with task too, it fine-tunes an encoder–decoder
    on a benchmark (docs/tasks.md).

    Example: smelt train recipes/train/tiny-moe.yaml --set output=runs/tiny --set steps=200

    On several GPUs: torchrun --nproc-per-node 8 -m smelt train RECIPE (docs/scaling-out.md).
    """
    from smelt import processes

    screen = Screen.of_the_first(as_json=as_json, quiet=quiet)
    with processes.together():
        _train(recipe, settings, screen)


def _train(recipe: Path, settings: options.Sets, screen: Screen) -> None:
    from transformers import logging

    from smelt.evaluate.results import markdown
    from smelt.settings import find_recipe, load_recipe
    from smelt.train.settings import TrainRecipe
    from smelt.train.trainer import train as run

    logging.disable_progress_bar()  # transformers' own bars: ours say enough
    read = load_recipe(find_recipe(recipe, "train"), TrainRecipe, settings or ())
    if read.task is not None:
        screen.note(f"reading {read.task.name} and the weights of {read.start}")
    elif read.start is not None:
        screen.note(f"reading text and the weights of {read.start}")
    else:
        screen.note(f"reading text and building a {read.model.model_type}")
    with screen.watching() as stages, _keeping(read):
        progress = stages("training")
        result = run(
            read, on_step=lambda step, steps, nats: progress(f"{nats:.3f} nats", step, steps)
        )
    rows = _row if read.seeds is None else _row_of_seeds
    table = markdown([rows(name, found) for name, found in result["held_out"].items()])
    seeds = "" if read.seeds is None else f", each of {len(read.seeds)} seeds"
    screen.result(
        {"output": read.output, **result},
        f"{number(result['parameters'])} parameters, {result['tokens_trained']:,} tokens{seeds}, "
        f"in {clock(result['seconds'])}\n\n{table}\nWritten to {read.output}" + _next(read),
    )


def _row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "held-out text": name,
        "nats per token": found["nats_per_token"],
        "of unigram": f"{found['share_of_unigram']:.0%}",
        "bits per byte": found["bits_per_byte"],
    }


def _row_of_seeds(name: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "held-out text": name,
        "nats per token": found["nats_per_token"],
        "sd over seeds": found["standard_deviation"],
    }


def _next(recipe: "TrainRecipe") -> str:
    """What may be done with a stock checkpoint; a samoe is small already."""
    if recipe.model.model_type == "samoe" or recipe.seeds is not None:
        return ""
    if recipe.task is not None:
        return f"\n\nNext:  smelt evaluate {recipe.output} --benchmarks {recipe.task.name}"
    return (
        f"\n\nNext:  smelt inspect {recipe.output}\n"
        f"       smelt compress {recipe.output} OUT --keep 0.5"
    )


@contextmanager
def _keeping(recipe: "TrainRecipe") -> Iterator[None]:
    """Within: a signal says where the unfinished run lies, if it can be gone on with."""
    from smelt.train.resume import unfinished

    try:
        yield
    except Stopped as stopped:
        stopped.kept = unfinished(recipe)
        raise
