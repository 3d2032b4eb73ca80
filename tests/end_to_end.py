"""A compression from recipe to folder on random tokens, and what plain transformers makes of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.source import Checkpoint
from smelt.compress.apply import apply
from smelt.compress.calibrate import RoutingStats
from smelt.compress.facts import Facts
from smelt.compress.pipeline import run_plan
from smelt.compress.plan import Plan
from smelt.recipe import CompressRecipe


def load(folder: Path, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that plain transformers loads, and what it says of the keys."""
    config = Checkpoint.open(folder).config
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, **settings)
    return model.eval(), info


def logits_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def batches_of(inputs: list[dict[str, Tensor]]) -> list[Batch]:
    found = []
    for each in inputs:
        mask = torch.ones_like(each["input_ids"], dtype=torch.bool)
        found.append(Batch(each, mask, mask if "decoder_input_ids" in each else None))
    return found


def compress(
    checkpoint: Checkpoint,
    stats: RoutingStats,
    facts: Facts,
    output: Path,
    settings: dict[str, Any],
) -> tuple[Path, Plan]:
    settings = {"method": "m-smoe"} | settings
    recipe = CompressRecipe(source=str(checkpoint.folder), output=str(output), **settings)
    plan = run_plan(checkpoint, stats, recipe, facts)
    if not output.exists():
        apply(checkpoint, plan, output, stats=stats, facts=facts, workers=1)
    return output, plan
