"""Tiny SaMoE models: D 16, four blocks, four experts of 16 units, every value random."""

from typing import Any

import torch
from torch import Tensor

from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM

SHARING = (
    "pool",
    "none",
    "all",
    "groups",
    "bottom",
    "top",
    "pyramid",
    "residual",
    "union",
    "dense",
)
PRESETS = ("paper", "modern")
SCOPES = ("layer", "expert", "matrix")
VOCABULARY = 32


def tiny(preset: str = "paper", **fields: Any) -> SaMoEConfig:
    """A configuration of a preset, small."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_experts": 4,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    return SaMoEConfig.from_preset(preset, **(sizes | fields))


def build(config: SaMoEConfig, kind: Any = SaMoEForCausalLM, *, seed: int = 0) -> Any:
    """A model in evaluation mode, with noise on every parameter: none is zero or one."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def tokens(batch: int = 2, length: int = 10, *, seed: int = 1) -> Tensor:
    """Ids [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """[B, T, V], without gradients."""
    with torch.no_grad():
        found: Tensor = model(ids, **inputs).logits
    return found


def checkpointed(model: Any, **settings: Any) -> None:
    """Turn gradient checkpointing on, by whichever name this transformers has for it."""
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)(settings or None)
