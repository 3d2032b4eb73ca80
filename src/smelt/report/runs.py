"""What a folder or a plan that smelt wrote says of itself: read for a page, no weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError, safe_open

from smelt.checkpoint.source import Checkpoint
from smelt.compress.plan import Plan
from smelt.compress.usage import FILE as USAGE
from smelt.compress.usage import Usage, read_usage
from smelt.errors import CalibrationError, CheckpointError, PlanError

Kind = Literal["compressed", "healed", "trained", "exported", "plan"]


@dataclass(frozen=True)
class Run:
    """One result of smelt: a checkpoint it wrote, or a plan that is not carried out yet."""

    name: str  # unique on the page
    kind: Kind
    path: Path
    fingerprint: str | None  # of the weights; None: there are none
    num_bytes: int | None  # of the weights on disk
    plan: Plan | None = None
    usage: Usage | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""  # as YAML
    training: Mapping[str, Any] = field(default_factory=dict)  # training.json
    log: tuple[Mapping[str, Any], ...] = ()
    healing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The name of what it was made from."""
        return str(self.provenance.get("source") or "the original")

    def with_usage(self, found: "Statistics") -> "Run":
        """The run with the usage of the statistics that its plan was made from."""
        if self.plan is None or self.usage is not None:
            return self
        is_own = (self.plan.checkpoint, self.plan.text) == (found.checkpoint, found.usage.text)
        return replace(self, usage=found.usage) if is_own else self


@dataclass(frozen=True)
class Statistics:
    """What is shown of a folder of statistics."""

    name: str
    path: Path
    checkpoint: str  # fingerprint
    usage: Usage
    details: Mapping[str, Any]


def open_checkpoint_run(folder: Path) -> Run:
    """A checkpoint folder that smelt wrote.

    Raises:
        CheckpointError: smelt did not write it, or a file of it is damaged.
        PlanError: it was compressed, and its plan is missing or edited.
    """
    own = folder / "smelt"
    provenance, training = read_json(own / "provenance.json"), read_json(own / "training.json")
    has_plan = (own / "plan.json").is_file()
    if not has_plan and provenance and "export" not in provenance:
        raise PlanError(
            f"{folder}: was compressed by smelt, and smelt/plan.json is missing. Put the plan "
            "back, or compress again: the report says what was done from it."
        )
    if not has_plan and not provenance and not training:
        raise CheckpointError(
            f"{folder}: has no plan and no record of a run (smelt/plan.json, smelt/training.json): "
            "smelt did not make it. Name a folder that smelt wrote; an original comes onto the "
            "page with its measurements (--results, --bench)."
        )
    healing = read_json(own / "healing.json")
    opened = Checkpoint.open(folder)
    plan = Plan.load(own / "plan.json") if has_plan else None
    kind: Kind = "healed" if healing else "compressed" if has_plan else "trained"
    return Run(
        name=folder.name,
        kind="exported" if "export" in provenance else kind,
        path=folder,
        fingerprint=opened.fingerprint,
        num_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        plan=plan,
        usage=read_usage(folder / USAGE) if (folder / USAGE).is_file() else None,
        provenance=provenance,
        recipe=_recipe(own, plan),
        training=training,
        log=_log(own / ("heal-log.jsonl" if healing else "log.jsonl")),
        healing=healing,
    )


def open_plan(path: Path) -> Run:
    """A plan that is not carried out."""
    plan = Plan.load(path)
    return Run(path.stem, "plan", path, None, None, plan=plan, recipe=_recipe(path.parent, plan))


def open_statistics(folder: Path) -> Statistics:
    """The usage in a folder of statistics; the large tensors are left where they are."""
    try:
        index = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
        counts, saliencies = {}, {}
        for name, at in index["layers"].items():
            with safe_open(folder / at["file"], "pt") as tensors:
                counts[name] = tuple(tensors.get_tensor("count").tolist())
                saliency = tensors.get_tensor("gated_norm").tolist()
                saliencies[name] = tuple(float(f"{value:.6g}") for value in saliency)
        usage = Usage(index["num_tokens"], index["text"], counts, saliencies)
        return Statistics(folder.name, folder, index["checkpoint"], usage, index["details"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CalibrationError(
            f"{folder}: the statistics cannot be read ({error}). Calibrate again."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run's own; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). It was edited or cut short: put it back as it was."
        ) from None
    return found


def _recipe(own: Path, plan: Plan | None) -> str:
    """The recipe of a run as YAML: of a healing or a training, or the one within the plan."""
    files = [own / name for name in ("heal.yaml", "recipe.yaml") if (own / name).is_file()]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    if plan is not None:
        value = plan.recipe.model_dump(mode="json")
        texts.insert(0, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    return "\n".join(texts)


def _log(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines of a log that can be read: a killed run may have left half of one."""
    if not path.is_file():
        return ()
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            lines.append(found)
    return tuple(lines)
