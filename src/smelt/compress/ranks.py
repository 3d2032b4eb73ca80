"""Ranks of decomposed matrices: fixed by the energy they keep, or by the bytes they may take.

All experts of a layer's matrix share a rank, so one rank costs a column of U and a row of V of each
of them, and keeps the σ² that they have at that place together.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from smelt.errors import PlanError


def rank_cost(num_experts: int, num_rows: int, num_columns: int, itemsize: int) -> int:
    """Bytes of one rank: a column of U and a row of V of every expert."""
    return num_experts * (num_rows + num_columns) * itemsize


def rank_for_energy(spectrum: Float[Tensor, "G S"], share: float) -> int:
    """The least rank that keeps `share` of Σ σ², of all experts together.

    Raises PlanError for a share outside 0 … 1, and for a spectrum that is not finite.
    """
    if not 0 < share <= 1:
        raise PlanError(f"An energy of {share}: it is a share of Σ σ², above 0 and at most 1.")
    energy = _energy(spectrum).cumsum(0)
    # All of it must not be missed by the rounding of the sum.
    enough = energy >= share * energy[-1] * (1 - 1e-12)
    return int(enough.nonzero()[0]) + 1


def rank_for_bytes(cost: int, budget: int, most: int) -> int:
    """The largest rank that fits, at `cost` bytes each; at most `most`, which is min(O, I).

    Raises PlanError where not even rank 1 does.
    """
    if budget < cost:
        raise PlanError(
            f"{budget:,} bytes: rank 1 alone needs {cost:,}. Allow more, or keep fewer experts."
        )
    return min(most, budget // cost)


def ranks_under_budget(
    spectra: Sequence[Float[Tensor, "_ _"]], costs: Sequence[int], budget: int
) -> list[int]:
    """A rank for each matrix of all layers, so that together they keep the most energy.

    Args:
        spectra: singular values of each matrix; its columns are the ranks it can have.
        costs: bytes of one rank of each (`rank_cost`).
        budget: bytes for all U and V. Rows of S are not in it.

    Every matrix gets rank 1; then the rank that keeps the most σ² per byte is taken, and so on.
    Singular values fall, so what is kept is within one step of the best there is. Ties: the
    earlier matrix.

    Raises PlanError for a budget below what rank 1 everywhere needs.
    """
    needed = sum(costs)
    if budget < needed:
        raise PlanError(
            f"A budget of {budget:,} bytes for U and V: rank 1 of every matrix alone needs "
            f"{needed:,}. Allow more, keep fewer experts, or exclude layers."
        )
    energies = [_energy(spectrum) for spectrum in spectra]
    gain = torch.cat([e[1:] / cost for e, cost in zip(energies, costs, strict=True)])
    owner = torch.cat([torch.full((len(e) - 1,), i) for i, e in enumerate(energies)])
    ranks, left = [1] * len(costs), budget - needed
    is_full = [False] * len(costs)
    for matrix in owner[torch.sort(gain, descending=True, stable=True).indices].tolist():
        if is_full[matrix]:
            continue
        if costs[matrix] > left:
            is_full[matrix] = True
            continue
        ranks[matrix] += 1
        left -= costs[matrix]
    return ranks


def _energy(spectrum: Float[Tensor, "G S"]) -> Float[Tensor, " S"]:
    """σ² at each place, of all experts together, float64."""
    energy = spectrum.double().square().sum(0).cpu()
    if not torch.isfinite(energy).all():
        raise PlanError(
            "The singular values are not finite: the weights or the Grams have NaN or Inf. There "
            "is nothing sound to decompose."
        )
    return energy
