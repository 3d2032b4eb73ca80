"""The models that a benchmark takes turns with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from smelt.bench.traffic import Cost, SaMoECost, StockCost
from smelt.checkpoint.describe import describe
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
    if checkpoint.config.is_encoder_decoder:
        raise CheckpointError(
            f"{checkpoint.folder}: an encoder–decoder. Decode steps are measured of decoder-only "
            "models."
        )
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except (ValueError, RecipeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {checkpoint.cls.__name__} writes no token after another "
            f"({str(error).splitlines()[0]}). Give a causal language model."
        ) from None
    for parameter in model.parameters():  # out of the mapped file
        parameter.data = parameter.data.clone()
    torch.nn.Module.to(model, device)
    return Subject(checkpoint.folder.name, model.eval(), _cost(checkpoint, model))


def _cost(checkpoint: Checkpoint, model: PreTrainedModel) -> Cost | None:
    if isinstance(model, SaMoEForCausalLM):
        return SaMoECost(cast(SaMoEConfig, model.config))
    config = checkpoint.config.get_text_config()
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    if any(getattr(config, size, None) is None for size in sizes):
        return None
    try:
        return StockCost(describe(checkpoint), config)
    except CheckpointError:  # no experts, or a family that is not covered
        return None


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
                found.append(Subject(subject.name, model, subject.cost, threshold, kept))
        finally:
            model.skip_entries(0.0)
    if thresholds and len(found) == len(subjects):
        raise RecipeError(
            "--skip-alpha: none of these checkpoints has pool entries to leave out. Give a SaMoE "
            'one (sharing = "pool", mix = "activation" or "weight").'
        )
    return found
