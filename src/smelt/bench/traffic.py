"""Bytes that a decode step reads and FLOPs that it does, from the sizes of a model.

SaMoE counts itself (`smelt.samoe.count`); every other model is counted from its modules
(`smelt.bench.tree`). Experts are those of uniform routing, or those that tokens were seen to reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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


@dataclass(frozen=True)
class Seen:
    """What running a step shows and no size of a model tells."""

    hit: Sequence[Tensor]  # by MoE layer, how often each stored expert is reached [G], 0 to 1
    cached_values: float  # that the step finds in the cache
    flops: float  # executed
    expert_flops: float

    @property
    def distinct(self) -> list[float]:
        """Distinct experts reached, by MoE layer."""
        return [float(layer.sum()) for layer in self.hit]


class Cost(Protocol):
    """What a model's steps cost."""

    @property
    def params(self) -> int:
        """All parameters, shared ones once."""
        ...

    @property
    def active_params(self) -> float:
        """Parameters that one token meets, its tables whole."""
        ...

    def step(
        self,
        batch: int,
        context: int,
        hit: Sequence[float] | Sequence[Tensor] | None = None,
        kept: Sequence[int] | None = None,
        seen: Seen | None = None,
    ) -> Work:
        """One step.

        Args:
            hit: distinct experts reached, by MoE layer, or how often each; None: those of uniform
                routing.
            kept: pool entries that are run, by MoE layer; None: all.
            seen: of that very step.
        """
        ...


@dataclass(frozen=True)
class SaMoECost:
    """Of a SaMoE model or one of its controls."""

    config: SaMoEConfig

    @property
    def params(self) -> int:
        return self.config.num_params()

    @property
    def active_params(self) -> float:
        return count.num_active_params(self.config)

    def step(
        self,
        batch: int,
        context: int,
        hit: Sequence[float] | Sequence[Tensor] | None = None,
        kept: Sequence[int] | None = None,
        seen: Seen | None = None,  # noqa: ARG002  (the configuration tells all)
    ) -> Work:
        """One step; mixing weights (`mix="weight"`) reads them all and computes with one."""
        config, layout = self.config, self.config.layout
        one, K = count.expert_params(config), config.num_experts_per_tok
        P = config.pool_size if layout.is_mixed else 1
        uniform = [count.distinct_experts(layer.experts, K, batch) for layer in layout.layers]
        hit = [float(h) if isinstance(h, int | float) else float(h.sum()) for h in hit or uniform]
        kept = kept or [P] * len(uniform)
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
