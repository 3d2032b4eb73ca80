"""How alike layers are: linear CKA, cosine of outputs, what routings share. All of it streaming."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LinearCKA:
    """Linear centred kernel alignment between S sets of features of the same tokens.

    With X, Y [N, D] centred over the tokens: CKA(X, Y) = ‖XᵀY‖²_F / (‖XᵀX‖_F · ‖YᵀY‖_F). It is 1 of
    X with itself, and does not change when X is rotated, shifted or scaled. Unrelated features of D
    even directions have about D / (N + D), and not 0: give many times D tokens.

    One (S·D)² Gram is held, in float64; products within a chunk are of the features' own type.

    Source: Kornblith et al. 2019, arXiv:1905.00414, Eq. 5 with linear kernels.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.size = 0  # D
        self.shift: Tensor | None = None  # about the mean: what is squared stays small
        self.total: Tensor | None = None
        self.gram: Tensor | None = None

    def add(self, features: Float[Tensor, "S N D"]) -> None:
        """Take in the features of N more tokens."""
        S, N, D = features.shape
        wide = features.transpose(0, 1).reshape(N, S * D)
        if self.shift is None or self.total is None or self.gram is None:
            self.size, self.shift = D, wide.mean(0)
            self.total = torch.zeros(S * D, dtype=torch.float64)
            self.gram = torch.zeros(S * D, S * D, dtype=torch.float64)
        wide = wide - self.shift
        self.num_tokens += N
        self.total += wide.sum(0, dtype=torch.float64).cpu()
        self.gram += (wide.T @ wide).cpu()

    def result(self) -> Float[Tensor, "S S"]:
        """CKA of every pair; nan where features do not vary."""
        assert self.total is not None and self.gram is not None
        D = self.size
        centred = self.gram - torch.outer(self.total, self.total) / self.num_tokens
        S = len(centred) // D
        square = centred.view(S, D, S, D).square().sum((1, 3))  # ‖XᵀY‖²_F
        own = square.diagonal().sqrt()
        found = square / torch.outer(own, own)
        return (found + found.T) / 2  # products need not be symmetric to the last bit


class OutputCosine:
    """The mean cosine between what L layers make of the same inputs."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.counted: Tensor | None = None

    def add(self, outputs: Float[Tensor, "L N D"]) -> None:
        """Take in the outputs for N inputs; one that a layer maps to 0 counts in no pair of it."""
        norm = outputs.norm(dim=-1, keepdim=True)
        unit = torch.where(norm > 0, outputs / norm.clamp(min=1e-30), 0.0)
        cosine = torch.einsum("lnd,mnd->lm", unit, unit).double().cpu()
        there = (norm > 0).squeeze(-1).double().cpu()
        counted = there @ there.T
        self.total = cosine if self.total is None else self.total + cosine
        self.counted = counted if self.counted is None else self.counted + counted

    def result(self) -> Float[Tensor, "L L"]:
        """The mean over all inputs so far."""
        assert self.total is not None and self.counted is not None
        return self.total / self.counted


class Contingency:
    """How often expert e of one layer and expert f of another were chosen for the same token."""

    def __init__(self, num_experts: int, others: int) -> None:
        self.counts = torch.zeros(num_experts, others, dtype=torch.int64)

    def add(self, first: Int[Tensor, " N"], second: Int[Tensor, " N"]) -> None:
        """Take in the choices of N tokens."""
        E, F = self.counts.shape
        self.counts += torch.bincount((first * F + second).cpu(), minlength=E * F).view(E, F)

    def mutual_information(self) -> float:
        """As a share of the routings' own entropies: I(X; Y) / √(H(X) · H(Y)).

        1: the one follows from the other, 0: independent; nan where a layer uses one expert only.
        Entropies are corrected for the number of tokens: with m cells that are not empty,
        H = −Σ p log p + (m − 1) / 2N (Miller 1955); I = H(X) + H(Y) − H(X, Y).
        """
        first, second = _entropy(self.counts.sum(1)), _entropy(self.counts.sum(0))
        if first <= 0 or second <= 0:
            return math.nan
        both = _entropy(self.counts.flatten())
        return (first + second - both) / math.sqrt(first * second)

    def same(self) -> tuple[float, float]:
        """The share of tokens with one id in both layers, and the share that chance would make."""
        share = self.counts.double() / self.counts.sum()
        return float(share.trace()), float((share.sum(1) * share.sum(0)).sum())


def _entropy(counts: Int[Tensor, " C"]) -> float:
    """Nats, corrected for the number of tokens; 0 of a single cell."""
    share = counts.double() / counts.sum()
    plain = float(torch.special.entr(share).sum())
    return plain + (int((counts > 0).sum()) - 1) / (2 * int(counts.sum()))
