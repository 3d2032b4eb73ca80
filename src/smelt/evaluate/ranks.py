"""Stable ranks of a checkpoint's experts: how many directions each matrix really uses."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import Progress
from smelt.compress.decompose import stable_rank
from smelt.compress.facts import Facts, bank_reader

Ranks = Mapping[str, Mapping[str, list[float]]]
"""By layer, then by matrix (gate, up, down): one number for each stored expert."""


def stable_ranks(checkpoint: Checkpoint, facts: Facts, progress: Progress | None = None) -> Ranks:
    """‖W‖_F² / ‖W‖₂² of every matrix of every stored expert; 1 to the smaller of its sides.

    Merged experts of low stable rank are what low-rank factors hold well: M-SMoE,
    arXiv:2310.01334, section 3.2. One layer is in memory at a time.
    """
    read = bank_reader(checkpoint, facts)
    found = {}
    for done, layer in enumerate(facts.layers):
        bank = read(layer.name).tensors()
        found[layer.name] = {
            name: stable_rank(bank[name]).tolist() for name in layer.matrices if name in bank
        }
        if progress:
            progress(layer.name, done + 1, len(facts.layers))
    return found


def rank_rows(ranks: Ranks, beside: Ranks | None) -> list[dict[str, Any]]:
    """A row per layer and matrix: the mean over its experts, the least and the most.

    Args:
        beside: of the checkpoint it was made from, layers in the same order.
    """
    rows = []
    others = list(beside.values()) if beside else [None] * len(ranks)
    for (layer, matrices), other in zip(ranks.items(), others, strict=True):
        for name, values in matrices.items():
            row: dict[str, Any] = {"layer": layer, "matrix": name}
            if other is not None:
                row["before"] = _words(other[name])
            rows.append({**row, "stable rank": _words(values), "experts": len(values)})
    return rows


def mean_ratio(ranks: Ranks, beside: Ranks) -> float:
    """Stable rank over that of the original, the mean over layers and matrices."""
    return fmean(
        fmean(values) / fmean(other[name])
        for matrices, other in zip(ranks.values(), beside.values(), strict=True)
        for name, values in matrices.items()
    )


def _words(values: list[float]) -> str:
    return f"{fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
