"""Tokens of one layer that it is fitted to, and how sums over processes are taken."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Reduce = Callable[[Sequence[Tensor]], None]
"""Sums tensors over processes, in place; each process holds a part of the tokens."""


def alone(_: Sequence[Tensor]) -> None:
    """The sum over one process."""


@dataclass(frozen=True)
class LayerSample:
    """Tokens of one layer: what goes in, what should come out, and how much each counts."""

    x: Float[Tensor, "N D"]
    target: Float[Tensor, "N D"]
    held_out: Bool[Tensor, " N"]
    first: int = 0  # where these tokens lie among those of all processes
    total: int | None = None  # tokens of all processes

    @property
    def num_tokens(self) -> int:
        """Of all processes."""
        return len(self.x) if self.total is None else self.total

    def weights(self, rule: str) -> Float[Tensor, " N"]:
        """How much the squared error of each token counts.

        `none`: 1. `saliency`: the norm of what the layer should give. `relative`: one over its
        square, so that every token's error counts as a share of its own output.
        """
        if rule == "none":
            return torch.ones(len(self.x), device=self.x.device)
        norm: Tensor = torch.linalg.vector_norm(self.target, dim=1, dtype=torch.float32)
        if rule == "saliency":
            return norm
        square = norm.square()
        inverse: Tensor = torch.where(square > 0, 1 / square, 0.0)
        return inverse

    def corrected(self, here: Float[Tensor, "N D"], wanted: Float[Tensor, "N D"]) -> "LayerSample":
        """The sample whose target takes the block's output from `here` to `wanted`."""
        target = self.target.float() + wanted.float() - here.float()
        return replace(self, target=target.to(self.target.dtype))
