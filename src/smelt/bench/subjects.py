"""The models that a benchmark takes turns with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from smelt.bench.traffic import Cost, SaMoECost
from smelt.bench.tree import TreeCost, tree_cost
from smelt.checkpoint.bind import MoeLayer, NoExpertsError, find_layers
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError, RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A model to measure: of its pool entries, those that reach the threshold."""

    name: str
    model: PreTrainedModel
    cost: Cost | None  # None: only time is measured
    threshold: float | None = None
    kept: tuple[int, ...] | None = None  # pool entries run, by MoE layer
    layers: tuple[MoeLayer, ...] | None = ()  # of stock families; None: experts we do not know
    fingerprint: str = ""

    def num_stored(self, calls: Sequence[Sequence[Tensor]]) -> list[int]:
        """By MoE layer, how many experts there are weights for."""
        if isinstance(self.cost, TreeCost):
            return [len(sizes) for sizes in self.cost.experts]
        return [layer.experts for layer in self.model.config.layout.layers][: len(calls)]

    def choose(self) -> None:
        """Let the model run the entries of this subject: several subjects can share a model."""
        if isinstance(self.model, SaMoEForCausalLM):
            self.model.skip_entries(self.threshold or 0.0)


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; None: float32 on a CPU, bfloat16 on a GPU.

    Raises:
        RecipeError: no such dtype, or one that this device does not compute in.
    """
    name = name or ("float32" if device.type == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise RecipeError(f"--dtype {name}: it is one of {', '.join(DTYPES)}.")
    if name == "float16" and device.type == "cpu":
        raise RecipeError("--dtype float16: on a CPU it is float32 or bfloat16.")
    return DTYPES[name]


def load(
    source: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Subject:
    """A checkpoint as a subject, its weights in memory.

    Raises:
        CheckpointError: not a checkpoint, or not of a model that writes one token after another.
    """
    checkpoint = Checkpoint.open(source, trust_remote_code=trust_remote_code)
    model = in_memory(checkpoint, dtype, device)
    return subject(model, checkpoint.folder.name, checkpoint.fingerprint)


def in_memory(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with its weights in the memory of a device, as transformers loads it.

    Raises:
        CheckpointError: a weight is missing, or no such model writes one token after another.
    """
    checkpoint.check()
    model = _model(checkpoint, dtype)
    for parameter in model.parameters():  # out of the mapped file
        parameter.data = parameter.data.clone()
    torch.nn.Module.to(model, device)
    model.eval()
    return model


def subject(model: PreTrainedModel, name: str, fingerprint: str = "") -> Subject:
    """A model in memory as a subject."""
    if isinstance(model, SaMoEForCausalLM):
        cost = SaMoECost(cast(SaMoEConfig, model.config))
        return Subject(name, model, cost, fingerprint=fingerprint)
    try:
        layers = tuple(find_layers(model))
    except NoExpertsError:
        layers = ()
    except CheckpointError:  # experts that smelt does not read
        return Subject(name, model, None, layers=None, fingerprint=fingerprint)
    return Subject(name, model, tree_cost(model, layers), layers=layers, fingerprint=fingerprint)


def _model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers loads it, by whichever of its classes writes tokens."""
    autos: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText]
    if checkpoint.config.is_encoder_decoder:
        autos = [AutoModelForSeq2SeqLM]
    said = ""
    for auto in autos:
        try:
            found: PreTrainedModel
            found, about = auto.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                trust_remote_code=checkpoint.trust_remote_code,
                output_loading_info=True,
            )
        except (ValueError, ImportError, RecipeError) as error:
            said = said or str(error).strip().splitlines()[0]
            continue
        if not about["missing_keys"]:
            return found
        said = f"it has no {min(about['missing_keys'])}"
    raise CheckpointError(
        f"{checkpoint.folder}: {checkpoint.cls.__name__} writes no token after another ({said}). "
        "Give a language model."
    )


def variants(subjects: Sequence[Subject], thresholds: Sequence[float]) -> list[Subject]:
    """The subjects, each SaMoE model also with the pool entries below a threshold left out.

    Raises:
        RecipeError: no model has a pool, or a threshold empties a layer.
    """
    found: list[Subject] = []
    for subject in subjects:
        found.append(subject)
        model = subject.model
        if not isinstance(model, SaMoEForCausalLM) or not model.config.layout.is_mixed:
            continue
        try:
            for threshold in thresholds:
                kept = tuple(len(entries) for entries in model.skip_entries(threshold))
                found.append(replace(subject, threshold=threshold, kept=kept))
        finally:
            model.skip_entries(0.0)
    if thresholds and len(found) == len(subjects):
        raise RecipeError(
            "--skip-alpha: none of these checkpoints has pool entries to leave out. Give a SaMoE "
            'one (sharing = "pool", mix = "activation" or "weight").'
        )
    return found
