"""The obvious, slow versions of the merge rules: loops over units, experts and tokens."""

import torch
from torch import Tensor

from smelt.compress.members import Group
from smelt.experts import hidden


def fisher_mean(values: list[float], fisher: list[float], weights: list[float]) -> float:
    """The mean of one number by weight and certainty; by weight where nobody is certain."""
    sure = [w * f for w, f in zip(weights, fisher, strict=True)]
    if sum(sure) == 0:
        sure = weights
    return sum(s * v for s, v in zip(sure, values, strict=True)) / sum(sure)


def regmean_matrix(
    inputs: list[Tensor], matrices: list[Tensor], weights: list[float], shrink: float
) -> Tensor:
    """Row by row, the least squares of all tokens of all members, the shrinking as more tokens.

    α G + (1 − α) diag G is the Gram of the tokens, α of each, and of (1 − α) of each entry alone.
    """
    rows, targets = [], []
    for x, matrix, weight in zip(inputs, matrices, weights, strict=True):
        one = (weight / len(x)) ** 0.5
        rows.append(x.double() * (shrink * one**2) ** 0.5)
        for i in range(x.shape[1]):
            alone = torch.zeros(1, x.shape[1], dtype=torch.float64)
            alone[0, i] = ((1 - shrink) * one**2) ** 0.5 * x[:, i].double().norm()
            rows.append(alone)
        targets += [r @ matrix.double().T for r in rows[-1 - x.shape[1] :]]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T


def zipped(group: Group) -> dict[str, Tensor]:
    """ZipIt by lists of units: every correlation computed anew from activations at every step."""
    w = group.weights.tolist()
    units = []
    for m in range(group.bank.num_experts):
        h = hidden(group.bank, m, group.x).double()
        units += [[(m, i, h[:, i])] for i in range(group.bank.hidden_size)]
    while len(units) > group.bank.hidden_size:
        best, pair = -2.0, (0, 0)
        for i in range(len(units)):
            for j in range(i + 1, len(units)):
                both = torch.stack([_mean([(w[m], h) for m, _, h in units[k]]) for k in (i, j)])
                found = float(torch.corrcoef(both)[0, 1])
                if found > best:
                    best, pair = found, (i, j)
        i, j = pair
        units[i] += units.pop(j)
    tensors = group.bank.tensors()
    out = {}
    for name in [n for n in tensors if not n.startswith("down")]:
        rows = [_mean([(w[m], tensors[name][m, i].double()) for m, i, _ in one]) for one in units]
        out[name] = torch.stack(rows)
    columns = [sum(w[m] * tensors["down"][m, :, i].double() for m, i, _ in one) for one in units]
    out["down"] = torch.stack(columns, 1)
    return out


def _mean(weighted: list[tuple[float, Tensor]]) -> Tensor:
    return sum(w * t for w, t in weighted) / sum(w for w, _ in weighted)


def pairs_fit(vectors: list[Tensor]) -> float:
    """Σ over pairs of members of their inner product: what MergeMany climbs."""
    return sum(float((a * b).sum()) for k, a in enumerate(vectors) for b in vectors[k + 1 :])
