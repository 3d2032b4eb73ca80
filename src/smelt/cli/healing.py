"""The command that trains a compressed checkpoint back towards its original."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, clock, keeping, number
from smelt.errors import RecipeError

if TYPE_CHECKING:
    from smelt.train.heal_settings import HealRecipe


def heal(
    source: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT|RECIPE.yaml",
            help="The compressed checkpoint; or a recipe, which names all there is to name.",
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="The original it was made from.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The folder to make.")
    ] = None,
    text: options.Texts = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out", help="Text to measure on, python:held-out by default. Repeat for more."
        ),
    ] = None,
    tokens: options.Tokens = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of training [300].")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Sequences of a step [16].")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="The highest one [2e-4; routers 5e-5; lora 5e-4]."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option("--train", help="all (but the routers), experts, routers or lora."),
    ] = None,
    cached: Annotated[
        bool,
        typer.Option(
            "--cached",
            help="Ask the teacher first and keep its 64 likeliest tokens on disk, so that teacher "
            "and student are never in memory together.",
        ),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Decompose the merged experts while healing (mapped form)."),
    ] = None,
    seed: options.Seed = None,
    settings: options.Sets = None,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a compressed checkpoint back towards its original by distillation.

    Two ways to call it. `smelt heal STUDENT --teacher ORIGINAL -o OUT` heals on the running
    Python's own library or on --text, by defaults that options change. `smelt heal RECIPE.yaml`
    (recipes/heal/) reads every setting from a file; options and --set change those of the file.

    Example: smelt heal half --teacher Qwen3-30B-A3B -o half-healed --text notes.txt --steps 500
    """
    is_recipe = source.endswith((".yaml", ".yml"))
    values: dict[str, Any] = {
        "student": None if is_recipe else source,
        "teacher": teacher,
        "output": output,
        "text.train": text,
        "text.held_out": held_out,
        "text.tokens": tokens,
        "text.seed": seed,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "train": train,
        "cache": {} if cached else None,
        "decompose.rank": rank,
        "trust_remote_code": trust_remote_code or None,
    }
    recipe = _recipe(Path(source) if is_recipe else None, values, settings)
    _heal(recipe, Screen(as_json=as_json, quiet=quiet))


def _recipe(file: Path | None, given: dict[str, Any], settings: options.Sets) -> "HealRecipe":
    """The recipe of a file, then of options, then of --set: the later ones win."""
    from smelt.settings import check_recipe, override_value, read_values
    from smelt.train.heal_settings import HealRecipe

    values: dict[str, Any] = {} if file is None else read_values(file, HealRecipe)
    for key, value in given.items():
        if value is not None:
            _put(values, key, value)
    for override in settings or ():
        override_value(values, override)
    for name, option in (("teacher", "--teacher ORIGINAL"), ("output", "-o FOLDER")):
        if file is None and not values.get(name):
            raise RecipeError(f"smelt heal: {option} is missing. Name it, or give a recipe file.")
    return check_recipe(values, HealRecipe, origin=str(file or "settings"))


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    group, _, last = key.rpartition(".")
    if group and values.get("task") is not None and group == "text":
        if last == "seed":
            return
        raise RecipeError(f"{last}: the recipe heals on a task, not on text. Leave the option out.")
    place = values
    if group:
        place = dict(values.get(group) or {})
        values[group] = place
    place[last] = value


def _heal(recipe: "HealRecipe", screen: Screen) -> None:
    from transformers import logging

    from smelt.evaluate.results import markdown
    from smelt.train.heal import heal as run

    logging.disable_progress_bar()  # transformers' own bars: ours say enough
    screen.note(f"reading {recipe.student} and {recipe.teacher}")
    with screen.watching() as stages, keeping(recipe.output):
        progress = stages("healing")
        result = run(
            recipe,
            on_step=lambda step, steps, nats: progress(f"{nats:.3f} nats", step, steps),
            stages=stages,
        )
    table = markdown([_row(name, result) for name in result["before"]])
    bound = "" if recipe.cache is None else " (a lower bound, from the tokens kept)"
    screen.result(
        {"output": recipe.output, **result},
        f"{number(result['parameters_trained'])} parameters trained, "
        f"{number(result['parameters'])} written, {result['tokens_trained']:,} tokens, in "
        f"{clock(result['seconds'])}\n\n{table}\n"
        f"Nats per token; KL is the distance from the teacher's predictions{bound}.\n"
        f"Written to {recipe.output}\n\n"
        f"Next:  smelt evaluate {recipe.teacher} {recipe.student} {recipe.output} "
        f"--original {recipe.teacher}",
    )


def _row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    before, after = result["before"][name], result["after"][name]
    return {
        "held-out": name,
        "teacher": before["teacher_nats_per_token"],
        "before": before["nats_per_token"],
        "after": after["nats_per_token"],
        "KL before": before["kl_to_teacher"],
        "KL after": after["kl_to_teacher"],
    }
