"""The pool: P entries of E experts, stored once, and how a layer's α combines them.

Letters: P entries, E experts, F hidden units of one expert of one entry, D model width, R rows in
order of their expert.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from smelt.samoe.grouped import grouped_linear
from smelt.samoe.phases import mark


@dataclass(frozen=True)
class PoolWeights:
    """The tensors of a pool as a layer uses them; entry c has the hidden units c·F … (c+1)·F."""

    up: Float[Tensor, "E PF D"]
    down: Float[Tensor, "E D PF"]
    gate: Float[Tensor, "E PF D"] | None
    up_bias: Float[Tensor, "E PF"] | None
    gate_bias: Float[Tensor, "E PF"] | None
    down_bias: Float[Tensor, "E P D"] | None
    entries: int
    activation: Any  # elementwise over hidden units

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def hidden_size(self) -> int:
        """F, of one entry."""
        return self.up.shape[1] // self.entries

    def first_experts(self, count: int) -> "PoolWeights":
        """The first `count` experts of every entry."""
        if count == self.num_experts:
            return self
        return self._mapped(lambda t: t[:count])

    def picked(self, experts: Int[Tensor, " U"]) -> "PoolWeights":
        """The experts of these ids."""
        return self._mapped(lambda t: t[experts])

    def entry(self, index: int) -> "PoolWeights":
        """One pool entry by itself; a view."""
        F = self.hidden_size
        part = slice(index * F, (index + 1) * F)

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, part]

        return replace(
            self,
            up=self.up[:, part],
            down=self.down[:, :, part],
            gate=cut(self.gate),
            up_bias=cut(self.up_bias),
            gate_bias=cut(self.gate_bias),
            down_bias=None if self.down_bias is None else self.down_bias[:, index : index + 1],
            entries=1,
        )

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "PoolWeights":
        names = ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")
        tensors = {name: getattr(self, name) for name in names}
        changes: dict[str, Any] = {n: t if t is None else function(t) for n, t in tensors.items()}
        return replace(self, **changes)


@dataclass(frozen=True)
class Alpha:
    """A layer's α, spread over experts: one factor per matrix, expert and entry."""

    up: Float[Tensor, "E P"] | None  # None: 1 everywhere
    gate: Float[Tensor, "E P"] | None
    down: Float[Tensor, "E P"]

    def picked(self, experts: Int[Tensor, " U"]) -> "Alpha":
        """The rows of these experts."""
        up = None if self.up is None else self.up[experts]
        gate = None if self.gate is None else self.gate[experts]
        return Alpha(up, gate, self.down[experts])


class ExpertPool(nn.Module):
    """P entries of E experts as parameters: `up[E, P·F, D]`, `down[E, D, P·F]`, biases."""

    def __init__(
        self,
        *,
        entries: int,
        num_experts: int,
        model_size: int,
        hidden_size: int,
        is_gated: bool,
        has_bias: bool,
        hidden_act: str,
    ) -> None:
        super().__init__()
        E, D, PF = num_experts, model_size, entries * hidden_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape))

        self.entries, self.activation = entries, ACT2FN[hidden_act]
        self.up = parameter(E, PF, D)
        self.down = parameter(E, D, PF)
        self.gate = parameter(E, PF, D) if is_gated else None
        self.up_bias = parameter(E, PF) if has_bias else None
        self.gate_bias = parameter(E, PF) if has_bias and is_gated else None
        self.down_bias = parameter(E, entries, D) if has_bias else None

    def forward(self, dtype: torch.dtype | None = None) -> PoolWeights:
        """The tensors, cast once for all layers that share them."""

        def cast(tensor: Tensor | None) -> Any:
            return tensor if tensor is None or dtype is None else tensor.to(dtype)

        return PoolWeights(
            cast(self.up),
            cast(self.down),
            cast(self.gate),
            cast(self.up_bias),
            cast(self.gate_bias),
            cast(self.down_bias),
            self.entries,
            self.activation,
        )

    def run(
        self,
        x: Float[Tensor, "R D"],
        sizes: Int[Tensor, " E"],
        alpha: Alpha | None,
        *,
        mix: Literal["activation", "weight"],
        kept: tuple[int, ...] | None,
        dtype: torch.dtype | None,
    ) -> Float[Tensor, "R D"]:
        """`pooled_experts` of a pool that one layer owns.

        A method of its own because the weights of a divided model are there within it only.
        """
        return pooled_experts(self.forward(dtype), x, sizes, alpha, mix=mix, kept=kept)


def pooled_experts(
    weights: PoolWeights,
    x: Float[Tensor, "R D"],
    sizes: Int[Tensor, " E"],
    alpha: Alpha | None,
    *,
    mix: Literal["activation", "weight"],
    kept: tuple[int, ...] | None = None,
) -> Float[Tensor, "R D"]:
    """The combined experts' outputs, before the gate weights.

    Args:
        x: rows in order of their expert; `sizes` says how many each expert has.
        alpha: None: the pool has one entry, and its factor is 1.
        kept: the entries that are run (None: all); the others count as α = 0.
    """
    if alpha is None:
        return _run(weights, x, sizes, None)
    entries = tuple(range(weights.entries)) if kept is None else kept
    if mix == "weight":
        if x.shape[0] < weights.num_experts and not torch.is_grad_enabled():
            hit = sizes.nonzero().squeeze(1)  # mix only what is reached
            weights, sizes = weights.picked(hit), sizes[hit]
            alpha = alpha.picked(hit)
        weights = replace(weights, up=mark(weights.up, done="experts", follows="mixing"))
        weights = mixed(weights, alpha, entries)
        weights = replace(weights, up=mark(weights.up, done="mixing", follows="experts"))
        return _run(weights, x, sizes, None)
    if len(entries) == weights.entries:
        return _run(weights, x, sizes, alpha)
    parts = [_run(weights.entry(c), x, sizes, _of_entry(alpha, c)) for c in entries]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def mixed(weights: PoolWeights, alpha: Alpha, entries: tuple[int, ...]) -> PoolWeights:
    """One expert layer whose weights are the α-weighted sums over the entries (weight mixing)."""
    E, P, F = weights.num_experts, weights.entries, weights.hidden_size
    chosen = slice(None) if len(entries) == P else list(entries)  # all of them: no copy

    def rows(tensor: Tensor | None, factor: Tensor | None) -> Any:
        """Σ_c α[e, c] · tensor[e, c·F …], over rows of up and gate and their biases."""
        if tensor is None:
            return None
        assert factor is not None
        apart = tensor.view(E, P, F, *tensor.shape[2:])
        return torch.einsum("ep,ep...->e...", factor[:, chosen].to(tensor.dtype), apart[:, chosen])

    down = weights.down.view(E, weights.down.shape[1], P, F)
    factor = alpha.down[:, chosen].to(down.dtype)
    bias = weights.down_bias
    return replace(
        weights,
        up=rows(weights.up, alpha.up),
        gate=rows(weights.gate, alpha.gate),
        up_bias=rows(weights.up_bias, alpha.up),
        gate_bias=rows(weights.gate_bias, alpha.gate),
        down=torch.einsum("ep,edpf->edf", factor, down[:, :, chosen]),
        down_bias=None
        if bias is None
        else torch.einsum("ep,epd->ed", factor.to(bias.dtype), bias[:, chosen])[:, None],
        entries=1,
    )


def _run(
    weights: PoolWeights, x: Tensor, sizes: Tensor, alpha: Alpha | None
) -> Float[Tensor, "R D"]:
    """One wider expert per id: P·F hidden units, those of entry c scaled by α_c."""
    F = weights.hidden_size

    def project(matrix: Tensor, bias: Tensor | None, factor: Tensor | None) -> Tensor:
        y = grouped_linear(x, matrix, bias, sizes)
        if factor is None:
            return y
        wide = factor.repeat_interleave(F, dim=1).to(y.dtype)
        return y * wide.repeat_interleave(sizes, dim=0, output_size=y.shape[0])

    hidden = project(weights.up, weights.up_bias, alpha.up if alpha else None)
    if weights.gate is None:
        hidden = weights.activation(hidden)
    else:
        gate = project(weights.gate, weights.gate_bias, alpha.gate if alpha else None)
        hidden = weights.activation(gate) * hidden
    bias = weights.down_bias
    if alpha is None:
        return grouped_linear(hidden, weights.down, None if bias is None else bias[:, 0], sizes)
    if bias is not None:
        bias = torch.einsum("ep,epd->ed", alpha.down.to(bias.dtype), bias)
    return grouped_linear(hidden, weights.down, bias, sizes, alpha.down.repeat_interleave(F, dim=1))


def _of_entry(alpha: Alpha, index: int) -> Alpha:
    one = slice(index, index + 1)
    return Alpha(
        None if alpha.up is None else alpha.up[:, one],
        None if alpha.gate is None else alpha.gate[:, one],
        alpha.down[:, one],
    )
