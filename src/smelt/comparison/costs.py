"""What a checkpoint costs: parameters, those that are not zero, bytes on disk, FLOPs."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from smelt.bench.flops import grouped_flops
from smelt.checkpoint.bind import find_layers
from smelt.checkpoint.observe import lift_capacity
from smelt.checkpoint.shards import read_header
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model

LENGTH, ROWS = 128, 4
"""Tokens of a counted sequence, on each side of an encoder–decoder, and how many of them."""


def costs(folder: str | Path, *, seed: int = 0) -> dict[str, Any]:
    """Sizes and FLOPs of a checkpoint.

    FLOPs are counted as the forward executes its matrix products, of 4 sequences of 128 tokens
    drawn at random (which experts they choose says little: experts of a layer cost the same, but
    for rows of S). Per token; of an encoder–decoder, per token read and token written together.

    Args:
        folder: a checkpoint.
        seed: of the tokens.
    """
    checkpoint = Checkpoint.open(folder)
    files = sorted(checkpoint.folder.glob("*.safetensors"))
    entries = [entry for file in files for entry in read_header(file).values()]
    floats = [entry for entry in entries if entry.dtype.is_floating_point]
    model = load_model(checkpoint).float().eval()
    layers = find_layers(checkpoint.model)
    for layer in layers:
        lift_capacity(model, layer)  # every token meets its experts, however they are crowded
    grouped: Any = {torch.ops.aten._grouped_mm: grouped_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=grouped) as counter:
        model(**inputs_of(model, ROWS, LENGTH, seed), use_cache=False)
    by_module: Mapping[str, Any] = counter.get_flop_counts()
    root = type(model).__name__
    moe = sum(sum(by_module.get(f"{root}.{layer.name}", {}).values()) for layer in layers)
    saved = dict(model.named_parameters())
    tokens = ROWS * LENGTH
    return {
        "parameters": sum(prod(entry.shape) for entry in floats),
        "nonzero_parameters": sum(int((p != 0).sum()) for p in saved.values()),
        "parameters_of_experts": sum(
            p.numel()
            for n, p in saved.items()
            if n.startswith(tuple(f"{x.experts}." for x in layers))
        ),
        "bytes": sum(entry.num_bytes for entry in entries),
        "experts": sum(layer.num_stored for layer in layers),
        "flops_per_token": counter.get_total_flops() / tokens,
        "moe_flops_per_token": moe / tokens,
    }


def inputs_of(model: PreTrainedModel, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens as a model takes them, as many to write as to read."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}
