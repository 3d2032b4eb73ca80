"""ZipIt: hidden units are matched across the experts of a group, and within each of them."""

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from smelt.compress.members import Group
from smelt.experts import ExpertBank

UNITS_AT_ONCE = 8192
"""Units matched at a time; larger groups are folded in member by member (4 bytes × units²)."""

ROWS = ("up", "gate", "up_bias", "gate_bias")
"""What a hidden unit computes with; its column of `down` is what becomes of it."""


def zipit(group: Group) -> ExpertBank:
    """The group's M·F hidden units, the two most correlated merged again until F are left.

    Units are compared by the correlation of their activations over the group's tokens; two units of
    one expert may merge. A merged unit takes part with the (weighted) mean of its units'
    activations. Rows of up and gate (and their biases) are averaged, together; the columns of down
    are added up, each times its expert's weight: the merged unit stands for all of them. Biases of
    down are the weighted mean. Fewer than two tokens: units are compared by the cosine of their
    weights. A unit that never varies correlates with nothing (0). Ties: lower units first. New
    units are in the order of the first of their units.

    Source: Stoica et al., arXiv:2305.03053, section 4. Differs: the correlations of a merged unit
    are computed anew, not bounded, and there is no budget of merges within one expert.
    """
    F, M = group.bank.hidden_size, group.bank.num_experts
    features = _features(group)
    parts = [_units(group, member, features[member]) for member in range(M)]
    while len(parts) > 1:
        fitting = max(2, UNITS_AT_ONCE // F)
        parts = [_zip(_joined(parts[:fitting]), F), *parts[fitting:]]
    found = parts[0]
    tensors = {n: t[None] for n, t in found.rows.items()} | {"down": found.columns.T[None]}
    if (bias := group.bank.down_bias) is not None:
        tensors["down_bias"] = torch.einsum("m,md->d", group.weights.to(bias), bias)[None]
    return group.bank.replaced(tensors)


class _Units:
    """Hidden units as rows of everything they are made of: [n, …], and how much each counts."""

    def __init__(
        self, rows: dict[str, Tensor], columns: Tensor, features: Tensor, weight: Tensor
    ) -> None:
        self.rows = rows
        self.columns = columns  # of down, already times the weights of their experts
        self.features = features
        self.weight = weight


def _units(group: Group, member: int, features: Tensor) -> _Units:
    tensors = group.bank.tensors()
    weight = group.weights[member].to(group.bank.up)
    return _Units(
        {n: tensors[n][member] for n in ROWS if n in tensors},
        tensors["down"][member].T * weight,
        features,
        weight.expand(group.bank.hidden_size),
    )


def _joined(parts: list[_Units]) -> _Units:
    rows = {n: torch.cat([p.rows[n] for p in parts]) for n in parts[0].rows}
    return _Units(
        rows,
        torch.cat([p.columns for p in parts]),
        torch.cat([p.features for p in parts]),
        torch.cat([p.weight for p in parts]),
    )


def _zip(units: _Units, number: int) -> _Units:
    """The units of each cluster as one unit."""
    weight = torch.where(units.weight > 0, units.weight, units.weight.new_tensor(_TINY))
    labels = clusters((units.features @ units.features.T).float(), weight, number)

    def added(value: Tensor) -> Tensor:
        return value.new_zeros(number, *value.shape[1:]).index_add_(0, labels, value)

    total = added(weight)

    def mean(value: Tensor) -> Tensor:
        one = (-1, *(1,) * (value.dim() - 1))
        return added(value * weight.view(one)) / total.view(one)

    return _Units(
        {n: mean(t) for n, t in units.rows.items()},
        added(units.columns),
        mean(units.features),
        added(units.weight),
    )


_TINY = 2.0**-60
"""The weight, in means of rows, of an expert that has none: only a cluster of such feels it."""


def _features(group: Group) -> list[Tensor]:
    """What units are compared by: [F, T] centred activations of each member, or all its weights."""
    if len(group.x) > 1:
        return [(h - h.mean(0)).T for h in group.hidden()]
    parts = [
        t if t.dim() == 3 else t[..., None] for n, t in group.bank.tensors().items() if n in ROWS
    ]
    return list(torch.cat([*parts, group.bank.down.transpose(1, 2)], 2))


def clusters(
    gram: Float[Tensor, "n n"], weight: Float[Tensor, " n"], number: int
) -> Int[Tensor, " n"]:
    """Labels 0..number-1: the two units of highest cosine become one until `number` are left.

    Args:
        gram: inner products of the units.
        weight: above 0; a merged unit is the mean of its own by these.

    One n×n matrix in memory besides `gram`; a merge costs O(n) and now and then O(n) more for a
    unit whose best partner is gone.
    """
    state = _Clustering(gram.cpu().numpy(), weight.double().cpu().numpy())
    owner = np.arange(len(gram))
    for _ in range(len(gram) - number):
        kept, gone = state.merge_best()
        owner[owner == gone] = kept
    return torch.from_numpy(np.unique(owner, return_inverse=True)[1].reshape(-1))


class _Clustering:
    """Inner products of the clusters so far, and for each its best partner of higher number."""

    def __init__(self, gram: NDArray[np.float32], weight: NDArray[np.float64]) -> None:
        self.gram = gram.astype(np.float32, copy=True)
        self.weight = weight.copy()
        self.inverse = _inverse(self.gram.diagonal())
        self.gone = np.zeros(len(gram), dtype=bool)
        found = [self._best(unit) for unit in range(len(gram))]
        self.partner = np.array([partner for partner, _ in found])
        self.value = np.array([value for _, value in found])

    def merge_best(self) -> tuple[int, int]:
        """Merge the closest pair; returns the unit that stays and the one that goes (higher)."""
        kept = int(self.value.argmax())
        gone = int(self.partner[kept])
        total = self.weight[kept] + self.weight[gone]
        a, b = (np.float32(self.weight[unit] / total) for unit in (kept, gone))
        row = a * self.gram[kept] + b * self.gram[gone]
        row[kept] = a * row[kept] + b * row[gone]
        self.gram[kept], self.gram[:, kept] = row, row
        self.weight[kept] = total
        self.inverse[kept] = _inverse(row[kept : kept + 1])[0]
        self.gone[gone], self.value[gone] = True, -np.inf
        # Among them `kept` itself, whose partner it was.
        lost = ~self.gone & ((self.partner == kept) | (self.partner == gone))
        for unit in np.flatnonzero(lost):
            self.partner[unit], self.value[unit] = self._best(int(unit))
        self._offer(kept)
        return kept, gone

    def _best(self, unit: int) -> tuple[int, float]:
        """The best partner above `unit`, the lowest of equals; −inf where there is none."""
        rest = slice(unit + 1, None)
        if self.gone[rest].all():
            return unit, -np.inf
        cosine = self.gram[unit, rest] * (self.inverse[unit] * self.inverse[rest])
        cosine[self.gone[rest]] = -np.inf
        best = int(cosine.argmax())
        return unit + 1 + best, float(cosine[best])

    def _offer(self, unit: int) -> None:
        """Units below a changed one may like it better now."""
        below = slice(0, unit)
        cosine = self.gram[unit, below] * (self.inverse[unit] * self.inverse[below])
        better = ~self.gone[below] & (
            (cosine > self.value[below])
            | ((cosine == self.value[below]) & (unit < self.partner[below]))
        )
        self.value[below][better] = cosine[better]
        self.partner[below][better] = unit


def _inverse(square: NDArray[np.float32]) -> NDArray[np.float32]:
    """1/√ of squared norms; 0 for a zero vector, which is then at right angles to all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[np.float32] = np.where(square > 0, 1 / np.sqrt(square), 0).astype(np.float32)
    return found
