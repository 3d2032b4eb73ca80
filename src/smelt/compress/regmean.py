"""RegMean: each matrix of the merged expert answers as its members do, each on its own tokens."""

import torch
from jaxtyping import Float
from torch import Tensor

from smelt.compress.members import Group, weighted_sum
from smelt.experts import ExpertBank, hidden

SHRINK = 0.9
"""What off-diagonal entries of a Gram are multiplied by (the paper's α for most models)."""


def regmean(group: Group, *, shrink: float = SHRINK) -> ExpertBank:
    """The W that minimises Σ_m w_m · mean over tokens x of member m of ‖W x − W_m x‖², per matrix.

        W = (Σ_m w_m W_m G_m) (Σ_m w_m G_m)⁻¹,    G_m = mean of x xᵀ, off-diagonal entries · shrink

    Up and gate read the tokens that chose the member, down reads the member's own hidden
    activations of them. With w in proportion to counts this is the paper's sum over tokens. Biases
    are the weighted mean. An input that is 0 in every token of every member says nothing about
    its column, which is the weighted mean too; so is all of a group that no sampled token reached.
    One member's Gram is in memory at a time, float64.

    Source: Jin et al., arXiv:2212.09849, Eq. 3 and section 4.3.
    """
    mean = weighted_sum(group)
    read = {"up": group.bank.model_size, "down": group.bank.hidden_size}
    sums = {name: _Normal(size) for name, size in read.items()}
    for member, weight in enumerate(group.weights.tolist()):
        x = group.tokens(member)
        if not len(x):
            continue
        own = {n: t[member] for n, t in group.bank.tensors().items() if t.dim() == 3}
        first = {n: t for n, t in own.items() if n != "down"}
        sums["up"].add(_gram(x, shrink) * weight, first)
        sums["down"].add(
            _gram(hidden(group.bank, member, x), shrink) * weight, {"down": own["down"]}
        )
    found = sums["up"].solve(mean) | sums["down"].solve(mean)
    return mean.replaced(found)


class _Normal:
    """The two sides of the normal equations of the matrices that read the same input."""

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.sides: dict[str, Tensor] = {}

    def add(self, gram: Tensor, weights: dict[str, Tensor]) -> None:
        self.gram += gram
        for name, weight in weights.items():
            side = weight.double().cpu() @ gram
            self.sides[name] = self.sides[name] + side if name in self.sides else side

    def solve(self, otherwise: ExpertBank) -> dict[str, Tensor]:
        """The merged matrices [1, O, I]; columns of inputs that never vary from 0: `otherwise`'s.

        The Gram at unit diagonal has no eigenvalue below 1 − shrink: a Cholesky needs no ridge.
        """
        seen = torch.where(self.gram.diagonal() > 0)[0]
        if not len(seen):
            return {}
        scale = self.gram.diagonal()[seen].rsqrt()
        factor = torch.linalg.cholesky(self.gram[seen][:, seen] * scale[:, None] * scale)
        found = {}
        for name, side in self.sides.items():
            merged = otherwise.tensors()[name][0].clone()
            right = torch.cholesky_solve((side[:, seen] * scale).T, factor).T * scale
            merged[:, seen] = right.to(merged)
            found[name] = merged[None]
        return found


def _gram(x: Float[Tensor, "T I"], shrink: float) -> Float[Tensor, "I I"]:
    """The mean of x xᵀ, its off-diagonal entries shrunk."""
    x64 = x.double().cpu()
    gram = x64.T @ x64 / len(x64)
    diagonal = gram.diagonal().clone()
    gram *= shrink
    gram.diagonal().copy_(diagonal)
    return gram
