"""llama.cpp in tests: the mark of those that need it, and what it and transformers compute."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="the package gguf is missing: pip install 'smelt[gguf]'"
)
needs_llama = pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("xllamacpp") is None,
    reason="llama.cpp is not installed (xllamacpp): pip install 'smelt[gguf]'",
)

TOLERANCE = 1e-4
"""Of float32 logits with a standard deviation of about 1.3; measured: 2e-5 at most."""


def token_ids(count: int, vocabulary: int = 96) -> list[int]:
    """Some tokens, none of them special."""
    import torch

    return torch.randint(
        3, vocabulary, (count,), generator=torch.Generator().manual_seed(1)
    ).tolist()


def by_transformers(
    folder: Path, ids: list[int], count: int
) -> "tuple[NDArray[np.float32], list[int]]":
    """Logits of each token, and the greedy continuation of the first eight."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        made = ids[:8]
        for _ in range(count):
            made = [*made, int(model(torch.tensor([made])).logits[0, -1].argmax())]
    return logits, made[8:]


def by_llama(path: Path, ids: list[int], count: int) -> "tuple[NDArray[np.float32], list[int]]":
    """The same, by llama.cpp."""
    from smelt.export.engine import Engine

    with Engine(path, context=len(ids) + 8 + count) as engine:
        return engine.logits(ids), engine.greedy(ids[:8], count)


def save_samoe(folder: Path) -> Path:
    """A tiny random SaMoE checkpoint, every block with experts."""
    from checkpoints import randomise
    from smelt.samoe.config import SaMoEConfig
    from smelt.samoe.model import SaMoEForCausalLM

    config = SaMoEConfig.from_preset(
        "modern",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_experts=4,
        vocab_size=96,
        moe_every=1,
    )
    model = SaMoEForCausalLM(config)
    randomise(model)
    model.save_pretrained(folder)
    return folder
