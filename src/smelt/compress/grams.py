"""What the matrices of experts read, as second moments: what a data-aware SVD whitens with.

Letters: G groups of merged experts, S sampled tokens, K choices, D model width, F hidden units.
"""

from collections.abc import Callable, Sequence
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smelt.experts import ExpertBank, hidden

_TOKENS_AT_ONCE = 1024


def grams_of(
    bank: ExpertBank, x: Float[Tensor, "S D"], groups: Int[Tensor, "S K"]
) -> dict[str, Sequence[Tensor]]:
    """Σ x xᵀ by matrix and expert, float64: [D, D] of "up" and "gate", [F, F] of "down".

    Over the tokens routed to the expert, divided by all tokens of the sample: an expert that serves
    few tokens counts little where one threshold decides for all.

    Args:
        bank: the merged experts.
        x: real tokens, as the experts read them.
        groups: the group of each choice; below 0 or from G on: none. A group that a token chose
            twice sees it once.

    Chunks are multiplied in float32 and added in float64. Made expert by expert when asked for: at
    64 experts of 2048 hidden units, all of them would be 2 GB.
    """
    num_tokens = max(1, len(x))

    def moment(read: Callable[[Tensor], Tensor], width: int, group: int) -> Tensor:
        own = x[(groups == group).any(1)]
        total = torch.zeros(width, width, dtype=torch.float64, device=x.device)
        for chunk in own.split(_TOKENS_AT_ONCE):
            rows = read(chunk).float()
            total += (rows.T @ rows).double()
        return total / num_tokens

    def of_hidden(group: int) -> Tensor:
        return moment(lambda t: hidden(bank, group, t.to(bank.up.dtype)), bank.hidden_size, group)

    def of_input(group: int) -> Tensor:
        return moment(lambda t: t, bank.model_size, group)

    inputs, outputs = _Each(bank.num_experts, of_input), _Each(bank.num_experts, of_hidden)
    gate = {} if bank.gate is None else {"gate": inputs}
    return {**gate, "up": inputs, "down": outputs}


class _Each(Sequence[Tensor]):
    """One tensor per expert, made when it is asked for and not kept."""

    def __init__(self, num_experts: int, make: Callable[[int], Tensor]) -> None:
        self.num_experts = num_experts
        self.make = make

    def __len__(self) -> int:
        return self.num_experts

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(self.num_experts))]
        return self.make(range(self.num_experts)[index])
