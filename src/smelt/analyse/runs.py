"""Runs as they lie on disk: what was trained, the weights, the log, and which runs are variants.

A run folder is what `smelt train` writes: weights, configuration and tokenizer, and in `smelt/` the
recipe and the log. What is missing is said when it is asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from smelt.errors import CheckpointError, RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.train.resume import FREE

SAME = frozenset(FREE) | {"seed", "keep_checkpoints", "checkpoint_every"}
"""Settings of a recipe that do not make another variant of a run."""

NAMES = {
    "pool": "SaMoE",
    "none": "AR-MoE",
    "all": "share-all",
    "groups": "grouped",
    "bottom": "share-bottom",
    "top": "share-top",
    "pyramid": "share-pyramid",
    "residual": "PR-MoE",
    "union": "UniPool",
    "dense": "dense",
}
LETTERS = {
    "num_experts": "E",
    "pool_size": "P",
    "num_experts_per_tok": "K",
    "hidden_size": "D",
    "moe_intermediate_size": "F",
    "num_hidden_layers": "blocks",
}


@dataclass(frozen=True)
class Run:
    """One trained model on disk."""

    folder: Path
    name: str  # unique among the runs opened together
    recipe: Mapping[str, Any]  # as written; {} where there is none
    log: tuple[Mapping[str, Any], ...]  # lines; () where there is none
    config: PreTrainedConfig | None  # None: there are no weights (yet)
    step: int | None = None  # a checkpoint on the way, not the end
    variant: str = field(default="", compare=False)  # what it shares with the runs of other seeds

    @property
    def is_samoe(self) -> bool:
        return isinstance(self.config, SaMoEConfig)

    @property
    def seed(self) -> int | None:
        return self.recipe.get("seed")

    @property
    def is_masked(self) -> bool:
        """Whether it predicts masked tokens."""
        return self.recipe.get("objective") == "masked" or not getattr(
            self.config, "is_causal", True
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        try:
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}: holds no tokenizer ({_short(error)}). Put the run's "
                "tokenizer.json and tokenizer_config.json beside its weights."
            ) from None
        return found

    def model(self, device: torch.device) -> PreTrainedModel:
        """The model in float32, evaluation mode."""
        auto: Any = AutoModelForMaskedLM if self.is_masked else AutoModelForCausalLM
        found: PreTrainedModel
        try:
            found, about = auto.from_pretrained(
                self.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder}: the weights cannot be loaded ({_short(error)}). Compare the "
                "folder with what `smelt train` wrote."
            ) from None
        if about["missing_keys"]:
            raise CheckpointError(
                f"{self.folder}: the weights lack {', '.join(sorted(about['missing_keys'])[:3])} "
                "(a shard is missing, or config.json is another model's)."
            )
        found.eval()
        found.to(device)  # type: ignore[arg-type]
        return found

    def facts(self) -> dict[str, Any]:
        """What tells variants apart: the model's configuration and the recipe, by dotted names."""
        settings = _flat({name: v for name, v in self.recipe.items() if name != "model"})
        values = {name: value for name, value in settings.items() if name not in SAME}
        config = self.config
        if isinstance(config, SaMoEConfig):
            names = [n for n in SaMoEConfig.__annotations__ if not n.endswith("token_id")]
            model = {name: getattr(config, name) for name in names}
        else:
            model = dict(self.recipe.get("model") or {})
            if config is not None:
                model = {"model_type": config.model_type} | model
        return values | _flat(model, "model") | ({"step": self.step} if self.step else {})

    @property
    def kind(self) -> str:
        """The architecture's name, without sizes."""
        if isinstance(self.config, SaMoEConfig):
            return NAMES[self.config.sharing]
        model = self.recipe.get("model") or {}
        if self.config is None and model.get("model_type") == "samoe":
            return NAMES.get(model.get("sharing", "pool"), "samoe")
        return str(getattr(self.config, "model_type", model.get("model_type", self.name)))


def open_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs of some folders, in the order given; a folder of `seed-*` runs means all of them.

    Raises:
        CheckpointError: a folder that does not exist or is no run.
        RecipeError: none is given, or one twice.
    """
    found: list[Path] = []
    for one in folders:
        path = Path(one).expanduser()
        found += _expanded(path)
    if not found:
        raise RecipeError("No run was given. Name the output folders of `smelt train`.")
    places = [path.resolve() for path in found]
    for place in places:
        if places.count(place) > 1:
            raise RecipeError(f"{place}: given twice. Name each run once.")
    runs = [_open(path, name) for path, name in zip(found, _unique(places), strict=True)]
    return _labelled(runs)


def _expanded(path: Path) -> list[Path]:
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: there is no such folder. Give the output folder of `smelt train`."
        )
    if (path / "config.json").is_file() or (path / "smelt").is_dir():
        return [path]
    seeds = [child for child in path.glob("seed-*") if child.is_dir()]
    if seeds:
        return sorted(seeds, key=lambda child: (len(child.name), child.name))
    raise CheckpointError(
        f"{path}: is no run: it holds neither config.json nor smelt/recipe.yaml nor seed-* "
        "folders. Give the output folder of `smelt train`."
    )


def _unique(places: Sequence[Path]) -> list[str]:
    """As few trailing parts of each path as tell them all apart."""
    for count in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-count:]) for place in places]
        is_seed = any(name.startswith("seed-") for name in names)
        if len(set(names)) == len(names) and not is_seed:
            return names
    return [str(place) for place in places]


def _open(folder: Path, name: str) -> Run:
    home, step = folder / "smelt", None
    if folder.parent.name == "checkpoints" and folder.name.startswith("step-"):
        home, step = folder.parent.parent, int(folder.name.removeprefix("step-"))
    config = None
    if (folder / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder}/config.json: cannot be read ({_short(error)}). Give the output folder "
                "of `smelt train`."
            ) from None
    log = _read_log(home / "log.jsonl")
    if step is not None:
        log = tuple(line for line in log if line.get("step", 0) <= step)
    return Run(folder, name, _read_recipe(home / "recipe.yaml"), log, config, step)


def _read_recipe(path: Path) -> dict[str, Any]:
    """The settings as they were written: a recipe of another version of smelt is read too."""
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML ({_short(error)}). Mend the file.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of settings. Mend the file.")
    return values


def _read_log(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The lines of a log; a last one that a kill left unfinished is passed over."""
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise CheckpointError(f"{path}: line {number} is no JSON. Mend the file.") from None
        if isinstance(value, dict) and "step" in value:
            found.append(value)
    return tuple(found)


def _labelled(runs: list[Run]) -> list[Run]:
    """The runs with the names of their variants: kind, and what differs within the kind."""
    facts = [run.facts() for run in runs]
    labels = []
    for run, own in zip(runs, facts, strict=True):
        others = [f for r, f in zip(runs, facts, strict=True) if r.kind == run.kind]
        words = [_word(name, own.get(name)) for name in _telling(others)]
        labels.append(" · ".join([run.kind, *words]))
    return [replace(run, variant=label) for run, label in zip(runs, labels, strict=True)]


def _telling(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """As few names as tell apart all that differ: sizes first, then the model's other fields.

    What follows from them (the learning rate that suits a variant best) is not named.
    """
    names = sorted({name: None for one in facts for name in one}, key=_is_of_recipe)
    order = [*(f"model.{name}" for name in LETTERS), *names]
    chosen: list[str] = []
    kinds = 1
    for name in order:
        split = {tuple(repr(one.get(n)) for n in (*chosen, name)) for one in facts}
        if len(split) > kinds:
            chosen, kinds = [*chosen, name], len(split)
    return chosen


def _is_of_recipe(name: str) -> bool:
    return not name.startswith("model.")


def _word(name: str, value: object) -> str:
    last = name.rpartition(".")[2]
    spelt = "–" if value is None else str(value)
    spelt = spelt if len(spelt) <= 28 else spelt[:27] + "…"
    if last in LETTERS:
        return (
            f"{LETTERS[last]} {spelt}"
            if last == "num_hidden_layers"
            else f"{LETTERS[last]}={spelt}"
        )
    return f"{last}={spelt}"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; lists are values."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
