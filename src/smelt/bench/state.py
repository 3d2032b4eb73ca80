"""A model that has read its context: the same next step can be made from there again and again."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

CONTEXTS = 8
"""Different contexts in a batch; further rows repeat them, each with a next token of its own."""


class State:
    """A cache after `context` tokens of each sequence, and the step that comes next.

    An encoder–decoder reads its context with the encoder; its decoder has written one token.
    """

    def __init__(self, model: PreTrainedModel, context: Tensor, batch: int) -> None:
        self.model = model
        self._given: dict[str, Any] = {}
        self._name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        self.cache: Any = self._filled(context, batch)
        self._can_crop = self._can_go_back(context[:1])
        self._kept = None if self._can_crop else copy.deepcopy(self.cache)

    def step(self, tokens: Tensor) -> None:
        """Give each sequence its next token [B, 1]."""
        asked = {self._name: tokens, "past_key_values": self.cache, "use_cache": True}
        self.model(**asked, **self._given)

    def back(self) -> None:
        """As before the last step: by cutting a token off, or with a copy where that cannot be."""
        if self._can_crop:
            self.cache.crop(-1)
        else:
            self.cache = copy.deepcopy(self._kept)

    @property
    def cached_values(self) -> int:
        """Values that a step finds in the cache: keys and values, states, of all sequences."""
        return sum(tensor.numel() for tensor in _tensors(self.cache))

    def _filled(self, context: Tensor, batch: int) -> Any:
        """The cache after `context` [R, T], its rows repeated to a batch."""
        model, config = self.model, self.model.config
        rows = torch.arange(batch, device=context.device) % len(context)
        if config.is_encoder_decoder:
            encoder: Any = model.get_encoder()
            found = encoder(input_ids=context)
            found.last_hidden_state = found.last_hidden_state[rows]
            self._given = {"encoder_outputs": found}
            start = torch.full_like(rows[:, None], config.decoder_start_token_id or 0)
            asked: dict[str, Any] = {"decoder_input_ids": start, "use_cache": True}
            return model(**asked, **self._given).past_key_values
        cache = DynamicCache(config=config) if self._takes_any(context.device) else None
        if context.shape[1] == 0:
            return cache
        if cache is None or not _is_plain(cache):  # other kinds of state do not repeat rows
            context, rows = context[rows], rows[:0]
        asked = {"past_key_values": cache, "use_cache": True, **last_logits(model)}
        cache = model(context, **asked).past_key_values
        if len(rows) > len(context):
            cache.batch_select_indices(rows)
        return cache

    def _takes_any(self, device: torch.device) -> bool:
        """Whether the model takes transformers' own cache, not only one that it makes (MiniMax)."""
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        made: Any = self.model(token, use_cache=True).past_key_values
        return type(made) is DynamicCache

    def _can_go_back(self, context: Tensor) -> bool:
        """Whether a token can be cut off the cache: not off a recurrent state, nor a window's end.

        Tried on one sequence, with what a step leaves behind compared.
        """
        if self.cache is None or _is_plain(self.cache):
            return self.cache is not None
        trial = copy.copy(self)
        trial.cache, trial._can_crop = trial._filled(context, 1), True
        before = [tensor.clone() for tensor in _tensors(trial.cache)]
        token = torch.zeros(1, 1, dtype=torch.long, device=context.device)
        try:
            trial.step(token)
            trial.back()
        except (RuntimeError, ValueError):
            return False
        after = list(_tensors(trial.cache))
        return len(before) == len(after) and all(map(torch.equal, before, after))


def last_logits(model: PreTrainedModel) -> dict[str, int]:
    """The argument that asks for the last token's logits alone, of models that take it."""
    takes = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


def _is_plain(cache: Any) -> bool:
    """Whether every layer keeps keys and values of all tokens, and nothing else."""
    if type(cache) is not DynamicCache:
        return False
    return {type(layer).__name__ for layer in cache.layers} <= {"DynamicLayer"}


def _tensors(cache: Any) -> Iterator[Tensor]:
    """What a cache holds, layer by layer."""
    parts = [] if cache is None else [cache]
    if isinstance(cache, EncoderDecoderCache):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    for part in parts:
        for layer in part.layers:
            for value in vars(layer).values():
                held = value.values() if isinstance(value, dict) else [value]
                yield from (tensor for tensor in held if isinstance(tensor, Tensor))
