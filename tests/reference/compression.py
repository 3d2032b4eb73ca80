"""The obvious, slow versions of the compression stages: loops over experts, pairs and units."""

from itertools import permutations
from math import floor, sqrt

import torch
from torch import Tensor

from smelt.experts import ExpertBank


def cosine_of(a: list[float], b: list[float]) -> float:
    """Cosine of two vectors; 0 where one is zero."""
    inner = sum(x * y for x, y in zip(a, b, strict=True))
    norms = sqrt(sum(x * x for x in a)) * sqrt(sum(y * y for y in b))
    return inner / norms if norms > 0 else 0.0


def pairwise_cosine(rows: Tensor) -> Tensor:
    """Cosines of all pairs of rows, with ones on the diagonal."""
    E = len(rows)
    table = torch.eye(E, dtype=torch.float64)
    for i in range(E):
        for j in range(E):
            if i != j:
                table[i, j] = cosine_of(rows[i].double().tolist(), rows[j].double().tolist())
    return table


def global_counts(
    shares: list[list[float]], average: float, excluded: set[int], floor_per_layer: int
) -> list[int]:
    """n_l: sort everything once, take the first K, then move entries one by one."""
    entries = []
    for layer, values in enumerate(shares):
        best = values.index(max(values))
        for expert, value in enumerate(values):
            raised = 1.0 if layer in excluded or expert == best else value
            entries.append((-raised, layer, expert))
    entries.sort()
    kept_whole = sum(len(shares[layer]) for layer in excluded)
    budget = floor(average * (len(shares) - len(excluded)) + kept_whole + 0.5)
    taken = entries[:budget]
    least = [
        len(values) if layer in excluded else min(floor_per_layer, len(values))
        for layer, values in enumerate(shares)
    ]
    counts = [sum(1 for entry in taken if entry[1] == layer) for layer in range(len(shares))]
    while any(n < low for n, low in zip(counts, least, strict=True)):
        short = next(layer for layer, n in enumerate(counts) if n < least[layer])
        lowest = max(entry for entry in taken if counts[entry[1]] > least[entry[1]])
        taken.remove(lowest)
        counts[lowest[1]] -= 1
        counts[short] += 1
    return counts


def most_similar(similarity: list[list[float]], dominants: list[int]) -> list[int]:
    """Labels: every other expert joins the dominant it is most similar to."""
    labels = []
    for expert, row in enumerate(similarity):
        if expert in dominants:
            labels.append(dominants.index(expert))
            continue
        best = 0
        for group, dominant in enumerate(dominants):
            if row[dominant] > row[dominants[best]]:
                best = group
        labels.append(best)
    return labels


def unit_vectors(bank: ExpertBank, expert: int) -> Tensor:
    """Everything one hidden unit is made of, as a row: [F, ...]."""
    parts = [bank.up[expert], bank.down[expert].T]
    if bank.gate is not None:
        parts.append(bank.gate[expert])
    parts += [b[expert][:, None] for b in (bank.up_bias, bank.gate_bias) if b is not None]
    return torch.cat([part.double() for part in parts], 1)


def best_order(bank: ExpertBank, reference: int, expert: int) -> tuple[int, ...]:
    """The best of all F! orders."""
    ours, theirs = unit_vectors(bank, reference), unit_vectors(bank, expert)
    units = range(bank.hidden_size)
    return max(
        permutations(units),
        key=lambda order: float(sum((ours[i] * theirs[order[i]]).sum() for i in units)),
    )
