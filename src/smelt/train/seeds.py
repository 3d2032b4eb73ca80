"""Several seeds of one recipe: what is done already, and what they say together."""

import json
import statistics
from pathlib import Path
from typing import Any

from smelt.errors import RecipeError
from smelt.settings import load_recipe
from smelt.train.resume import differences
from smelt.train.settings import TrainRecipe


def of_seed(recipe: TrainRecipe, seed: int) -> TrainRecipe:
    """The run of one seed."""
    output = f"{recipe.output.rstrip('/')}/seed-{seed}"
    return recipe.model_copy(update={"seeds": None, "seed": seed, "output": output})


def finished(folder: Path, recipe: TrainRecipe) -> dict[str, Any] | None:
    """What a finished run of this recipe reached; None: there is none.

    Raises:
        RecipeError: the folder holds a run of another recipe.
    """
    path = folder / "smelt" / "training.json"
    if not path.is_file():
        return None
    changed = differences(load_recipe(folder / "smelt" / "recipe.yaml", TrainRecipe), recipe)
    if changed:
        raise RecipeError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}. Restore them, name "
            "another output, or remove that folder."
        )
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def summary(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of what each source's held-out tokens cost, in nats.

    Args:
        results: of each seed, what its `training.json` holds.
    """
    first = next(iter(results.values()))
    held_out = {}
    for name in first["held_out"]:
        nats = [result["held_out"][name]["nats_per_token"] for result in results.values()]
        held_out[name] = {
            "nats_per_token": statistics.fmean(nats),
            "standard_deviation": statistics.stdev(nats) if len(nats) > 1 else None,  # n - 1
            "by_seed": dict(zip(map(str, results), nats, strict=True)),
        }
    return {
        "seeds": list(results),
        "parameters": first["parameters"],
        "tokens_trained": first["tokens_trained"],
        "held_out": held_out,
        "tokens_per_second": statistics.fmean(r["tokens_per_second"] for r in results.values()),
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
    }
