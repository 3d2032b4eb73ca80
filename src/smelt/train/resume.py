"""Going on after a kill: what a run was begun with, and where it can be taken up."""

import json
import shutil
from pathlib import Path
from typing import Any

from smelt.errors import RecipeError
from smelt.settings import Settings, check_recipe, dump_recipe, expand_environment
from smelt.train.settings import TrainRecipe

STATE = "smelt_state.json"  # written last: a checkpoint without it is unfinished
FREE = {
    "output",
    "seeds",
    "text.cache",
    "log_every",
    "details_every",
    "evaluate_every",
    "profile_every",
    "peak_flops",
    "tensorboard",
}
"""Settings that may be others after a resume: they change no weight and no loss kept."""


def last_checkpoint(folder: Path) -> Path | None:
    """The latest finished checkpoint of a run; unfinished ones are removed."""
    finished = []
    for path in folder.glob("checkpoint-*"):
        if (path / STATE).is_file():
            finished.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(finished, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def unfinished(recipe: TrainRecipe) -> Path | None:
    """The folder where a stopped run waits to be gone on with; None where nothing is kept."""
    output = Path(expand_environment(recipe.output)).expanduser()
    names = [output.name + ".partial"]
    if recipe.seeds is not None:
        output = output / "seeds"
        names = [f"seed-{seed}.partial" for seed in recipe.seeds]
    folders = [output.with_name(name) for name in names]
    return next((one for one in folders if last_checkpoint(one / "smelt") is not None), None)


def begin(folder: Path, recipe: Settings, text: dict[str, str]) -> Path | None:
    """Make the folder of a run, or find where an earlier one stopped in it.

    Args:
        folder: `OUTPUT.partial`.
        recipe: of this run.
        text: the hash of every text and of the tokenizer, by name.

    Returns:
        The checkpoint to go on from; None at the start.

    Raises:
        RecipeError: the run in the folder had another recipe or text.
    """
    checkpoint = last_checkpoint(folder / "smelt") if folder.is_dir() else None
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "smelt").mkdir(parents=True)
    else:
        _compare(folder, recipe, text)
    dump_recipe(recipe, folder / "smelt" / "recipe.yaml")
    started = json.dumps({"recipe": recipe.model_dump(mode="json"), "text": text}, indent=1)
    (folder / "smelt" / "started.json").write_text(started + "\n", encoding="utf-8")
    return checkpoint


def _compare(folder: Path, recipe: Settings, text: dict[str, str]) -> None:
    started = json.loads((folder / "smelt" / "started.json").read_text(encoding="utf-8"))
    # A setting that is newer than the run has its default there.
    changed = differences(check_recipe(started["recipe"], type(recipe)), recipe)
    changed = changed or [
        f"the content of {name} is another one"
        for name in sorted({*started["text"], *text})
        if started["text"].get(name) != text.get(name)
    ]
    if changed:
        raise RecipeError(
            f"{folder} holds an unfinished run with other settings: {'; '.join(changed)}. Restore "
            "them to go on, or remove that folder to begin anew."
        )


def differences(before: Settings, now: Settings) -> list[str]:
    """The settings that differ and decide the result, each with both values."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    return [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and name not in FREE
    ]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return found
