"""Bytes that a decode step reads and FLOPs that it does, from the sizes of a model.

SaMoE counts itself (`smelt.samoe.count`); for a stock family the counts follow from its parameters.
Experts are those of uniform routing, or those that tokens were seen to reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from smelt.checkpoint.describe import Description
from smelt.samoe import count
from smelt.samoe.config import SaMoEConfig


@dataclass(frozen=True)
class Work:
    """What one step of a batch reads and computes: experts, and everything else."""

    expert_values: float  # read once per layer that uses them
    expert_flops: float
    other_values: float  # all other weights, rows of tables, and the cache
    other_flops: float
    resident_values: float  # of weights: what several layers share counts once

    @property
    def values(self) -> float:
        return self.expert_values + self.other_values

    @property
    def flops(self) -> float:
        return self.expert_flops + self.other_flops


class Cost(Protocol):
    """What a model's steps cost."""

    def step(
        self,
        batch: int,
        context: int,
        hit: Sequence[float] | None = None,
        kept: Sequence[int] | None = None,
    ) -> Work:
        """One step.

        Args:
            hit: distinct experts reached, by MoE layer; None: those of uniform routing.
            kept: pool entries that are run, by MoE layer; None: all.
        """
        ...


@dataclass(frozen=True)
class SaMoECost:
    """Of a SaMoE model or one of its controls."""

    config: SaMoEConfig

    def step(
        self,
        batch: int,
        context: int,
        hit: Sequence[float] | None = None,
        kept: Sequence[int] | None = None,
    ) -> Work:
        """One step; mixing weights (`mix="weight"`) reads them all and computes with one."""
        config, layout = self.config, self.config.layout
        one, K = count.expert_params(config), config.num_experts_per_tok
        P = config.pool_size if layout.is_mixed else 1
        uniform = [count.distinct_experts(layer.experts, K, batch) for layer in layout.layers]
        hit, kept = hit or uniform, kept or [P] * len(uniform)
        every_expert = P * one * sum(uniform)
        expert_flops = self._expert_flops([P] * len(uniform))
        values = count.bytes_per_decode_step(config, batch, context, bytes_per_value=1)
        flops = count.flops_per_token(config, context)
        read = sum(h * k for h, k in zip(hit, kept, strict=True)) * one
        return Work(
            expert_values=read,
            expert_flops=batch * self._expert_flops(kept),
            other_values=values - every_expert,
            other_flops=batch * (flops - expert_flops),
            resident_values=values - every_expert + min(read, self._stored()),
        )

    def _expert_flops(self, kept: Sequence[int]) -> float:
        """Of one token, over all MoE layers; biases are not multiplied."""
        config = self.config
        matrices = (2 + config.is_gated) * config.hidden_size * (config.moe_intermediate_size or 0)
        runs = [1] * len(kept) if config.mix == "weight" else kept
        return 2 * config.num_experts_per_tok * matrices * sum(runs)

    def _stored(self) -> int:
        groups = self.config.layout.groups
        return sum(g.entries * g.experts for g in groups) * count.expert_params(self.config)


@dataclass(frozen=True)
class StockCost:
    """Of an ordinary checkpoint, from the parameters it has and those that a token meets."""

    about: Description
    config: Any  # transformers' configuration

    def step(
        self,
        batch: int,
        context: int,
        hit: Sequence[float] | None = None,
        kept: Sequence[int] | None = None,
    ) -> Work:
        """One step; a pool there is not, so `kept` changes nothing."""
        assert kept is None, "a stock model has no pool entries to leave out"
        about, config = self.about, self.config
        stored, K = about.num_stored, about.top_k
        idle = sum(n - min(K, n) for n in stored)
        one = (about.num_params - about.num_active_params) / max(idle, 1)
        uniform = [count.distinct_experts(n, min(K, n), batch) for n in stored]
        read = one * sum(hit or uniform)
        table = config.vocab_size * config.hidden_size
        weights = about.num_params - one * sum(stored)
        weights -= 0 if config.tie_word_embeddings else table  # the input table gives a row a token
        expert_flops = 2 * one * K * len(stored)
        return Work(
            expert_values=read,
            expert_flops=batch * expert_flops,
            other_values=weights + batch * config.hidden_size + self._cache(batch, context),
            other_flops=batch * (2 * weights + self._attention(context)),
            resident_values=weights + read,
        )

    def _heads(self) -> tuple[int, int, int]:
        config = self.config
        heads = int(config.num_attention_heads)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(size)

    @property
    def _depth(self) -> int:
        return int(self.config.num_hidden_layers)

    def _cache(self, batch: int, context: int) -> int:
        _, kv_heads, size = self._heads()
        return 2 * self._depth * kv_heads * size * batch * context

    def _attention(self, context: int) -> int:
        heads, _, size = self._heads()
        return 4 * self._depth * heads * size * context
