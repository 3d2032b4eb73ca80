"""What a model must be to be asked, and how it is while it is."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from smelt.errors import CheckpointError


def check_model(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise CheckpointError unless the model continues a text, and there is a token to begin it."""
    config = model.config.get_text_config()
    kind = type(model).__name__
    if model.config.is_encoder_decoder or not (
        model.can_generate() and getattr(config, "is_causal", True) is not False
    ):
        raise CheckpointError(
            f"{kind} is not a causal language model. Tasks are scored by the likelihood of an "
            "answer after its question: give a checkpoint that continues a text."
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"The tokenizer of this {kind} has neither a token to begin a text (BOS) nor one to "
            "end it (EOS), and a sentence needs one before its first word. Set tokenizer.eos_token."
        )


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within: no dropout, gradients, or cache of keys; afterwards the model is as it was."""
    config = model.config.get_text_config()
    was_training, used_cache = model.training, getattr(config, "use_cache", None)
    model.eval()
    if used_cache is not None:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if used_cache is not None:
            config.use_cache = used_cache
