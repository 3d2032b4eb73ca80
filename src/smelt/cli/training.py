"""The command that trains a small MoE."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, clock, number


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/train/tiny-moe.yaml.")],
    settings: options.Sets = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a small MoE of any family transformers knows, and save it as an ordinary checkpoint.

    Example: smelt train recipes/train/tiny-moe.yaml --set output=runs/tiny --set steps=200
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' own bars: ours say enough
    from smelt.evaluate.results import markdown
    from smelt.recipe import load_recipe
    from smelt.train.settings import TrainRecipe
    from smelt.train.trainer import train as run

    read = load_recipe(recipe, TrainRecipe, settings or ())
    screen.note(f"reading text and building a {read.model.model_type}")
    with screen.watching() as stages:
        progress = stages("training")
        result = run(
            read, on_step=lambda step, steps, nats: progress(f"{nats:.3f} nats", step, steps)
        )
    rows: list[dict[str, Any]] = [
        {
            "held-out text": name,
            "nats per token": found["nats_per_token"],
            "of unigram": f"{found['share_of_unigram']:.0%}",
            "bits per byte": found["bits_per_byte"],
        }
        for name, found in result["held_out"].items()
    ]
    screen.result(
        {"output": read.output, **result},
        f"{number(result['parameters'])} parameters, {result['tokens_trained']:,} tokens in "
        f"{clock(result['seconds'])}\n\n{markdown(rows)}\nWritten to {read.output}\n\n"
        f"Next:  smelt inspect {read.output}\n"
        f"       smelt compress {read.output} OUT --keep 0.5",
    )
