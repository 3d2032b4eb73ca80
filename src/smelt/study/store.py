"""What of a study is on disk: finished runs, evaluations and failures, by the names of cells."""

import json
import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from smelt.errors import RecipeError
from smelt.settings import expand_environment, read_values
from smelt.study.settings import Evaluation, StudyRecipe
from smelt.train.resume import FREE
from smelt.train.settings import TrainRecipe


class Store:
    """The folder of a study.

    Of every cell it holds cells/ID/ (the run's own folder), and beside it ID.yaml (its recipe),
    ID.log (what the process said), ID.json (its evaluation; of a trial that diverged, that it did)
    and ID.failed.json.
    """

    def __init__(self, output: str | Path) -> None:
        self.folder = Path(expand_environment(str(output))).expanduser()

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "cells" / name

    def beside(self, name: str, ending: str) -> Path:
        """A file beside the folder of a run."""
        folder = self.run(name)
        return folder.with_name(f"{folder.name}.{ending}")

    # --- runs ------------------------------------------------------------------------------------

    def is_trained(self, name: str) -> bool:
        """Whether the run is finished."""
        return (self.run(name) / "smelt" / "training.json").is_file()

    def is_begun(self, name: str) -> bool:
        """Whether the run is on its way: a kill interrupted it, or a process is at it."""
        return self.run(name + ".partial").exists()

    def has_weights(self, name: str) -> bool:
        """Whether weights lie in the run's folder; a record of a run has none."""
        return any(self.run(name).glob("*.safetensors"))

    def training(self, name: str) -> dict[str, Any] | None:
        """What the run reached (`training.json`), None while it is not finished."""
        return read(self.run(name) / "smelt" / "training.json")

    def trial_nats(self, name: str) -> float | None:
        """Mean held-out nats of a finished trial; infinite if it diverged; None: not done."""
        training = self.training(name)
        if training is not None:
            return mean_nats(training["held_out"])
        said = read(self.beside(name, "json")) or {}
        return math.inf if said.get("diverged") else None

    def steps_done(self, name: str) -> int:
        """Steps that an unfinished run has logged."""
        log = self.run(name + ".partial") / "smelt" / "log.jsonl"
        try:
            lines = log.read_text(encoding="utf-8").splitlines()
            return int(json.loads(lines[-1])["step"])
        except (OSError, IndexError, KeyError, ValueError):
            return 0

    # --- evaluations -----------------------------------------------------------------------------

    def evaluation(self, name: str) -> dict[str, Any]:
        """What was measured on a trained cell so far."""
        return read(self.beside(name, "json")) or {}

    def lacking(self, name: str, evaluation: Evaluation) -> list[str]:
        """What of an evaluation is not done yet."""
        found = self.evaluation(name)
        tasks = [one for one in evaluation.tasks if one not in found.get("tasks", {})]
        if evaluation.finetune is not None:
            done = found.get("finetune", {})
            wanted = evaluation.finetune.names()
            tasks += [f"finetune:{name}" for name in wanted if name not in done]
        return tasks

    # --- failures --------------------------------------------------------------------------------

    def failure(self, name: str) -> str | None:
        """Why a run failed the last time, None if it did not."""
        return (read(self.beside(name, "failed.json")) or {}).get("message")

    def fail(self, name: str, message: str) -> None:
        """Note a failure, for the table and the next run."""
        write(self.beside(name, "failed.json"), {"message": message})

    def forgive(self, name: str) -> None:
        """Forget a failure: the run has succeeded."""
        self.beside(name, "failed.json").unlink(missing_ok=True)

    def check(self, name: str, recipe: TrainRecipe, but: Collection[str] = ()) -> None:
        """A finished or begun run that had other settings is a RecipeError.

        Settings that one of the two does not have (of another version of smelt) are not compared.
        """
        for folder in (self.run(name), self.run(name + ".partial")):
            path = folder / "smelt" / "recipe.yaml"
            if not path.is_file():
                continue
            before = flat(read_values(path, TrainRecipe))
            now = flat(recipe.model_dump(mode="json"))
            for key in (before.keys() & now.keys()) - FREE - set(but):
                if before[key] != now[key]:
                    raise RecipeError(
                        f"{folder} was made with {key} = {before[key]!r}, the study says "
                        f"{now[key]!r}. Restore the setting, or remove that folder, or name "
                        "another output."
                    )


def mean_nats(held_out: Mapping[str, Any]) -> float:
    """The mean over held-out sources, of `held_out` of training.json or of its checkpoints."""
    values = [one["nats_per_token"] if isinstance(one, dict) else one for one in held_out.values()]
    return math.fsum(values) / len(values)


def slim(folder: Path, *, is_trial: bool) -> None:
    """Remove what a study does not need again: earlier checkpoints; of a trial all weights."""
    shutil.rmtree(folder / "smelt" / "checkpoints", ignore_errors=True)
    if is_trial:
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()


def read(path: Path) -> dict[str, Any] | None:
    """A JSON mapping, None where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    assert isinstance(found, dict)
    return found


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON mapping; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def evaluation_of(study: StudyRecipe, part: str) -> Evaluation:
    """A part's own evaluation, or the study's."""
    return study.parts[part].evaluation or study.evaluation
