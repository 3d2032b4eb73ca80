"""Train a model, heal a compressed one, freeze a SaMoE model into an ordinary checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smelt.compress.pipeline import Stages, silent
from smelt.recipe import check_recipe, load_recipe

if TYPE_CHECKING:
    from smelt.samoe.convert import Exported


def train(recipe: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train the model of a recipe file; what it reached (docs/samoe.md).

    Args:
        recipe: a YAML file, such as recipes/train/samoe-tiny.yaml.
        overrides: `name=value` or `group.name=value`, as of `--set`.
    """
    from smelt.train.settings import TrainRecipe
    from smelt.train.trainer import train as run

    return run(load_recipe(recipe, TrainRecipe, overrides))


def heal(
    student: str | Path,
    destination: str | Path,
    *,
    teacher: str | Path,
    stages: Stages = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Train a compressed checkpoint towards its original; what it was and is on held-out text.

    Args:
        settings: those of `HealRecipe` (docs/healing.md): steps, learning_rate, text={…}, …
    """
    from smelt.train.heal import HealRecipe
    from smelt.train.heal import heal as run

    names = {"student": str(student), "teacher": str(teacher), "output": str(destination)}
    recipe = check_recipe({**settings, **names}, HealRecipe)
    return run(recipe, stages=stages)


def export(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "qwen3_moe",
    dtype: str | None = None,
    verify: bool = True,
) -> "Exported":
    """Write a SaMoE model as an ordinary checkpoint of a stock family (docs/export.md)."""
    from smelt.samoe.convert import export as run

    return run(str(source), str(destination), to=to, dtype=dtype, verify=verify)
