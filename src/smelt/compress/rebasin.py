"""Git Re-Basin for a group: every member in the order that fits the mean of the others best."""

from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Int
from torch import Tensor

from smelt.compress.align import Aligner, weight_cost
from smelt.compress.members import members_of
from smelt.experts import ExpertBank, permute_hidden, select

ROUNDS = 100
"""At most so many rounds over the members of a group; some five are usual."""

_GAIN = 1e-6
"""Of the fit: what a new order must gain at least, lest rounding go round in circles."""


def merge_many(
    bank: ExpertBank, labels: Int[Tensor, " E"], dominants: Int[Tensor, " G"], aligner: Aligner
) -> Int[Tensor, "E F"]:
    """For `merge_groups`: hidden units of all members of a group in one order.

    In turn, each member is put in the order that fits the plain mean of the other members best (one
    linear assignment, for a feed-forward expert the whole of weight matching), until a round
    changes nothing. Each step raises Σ over pairs of their inner product. A group of two is one
    assignment: the same merged expert as `align: weights`, to the dominant.

    Source: Ainsworth et al., arXiv:2209.04836, Algorithm 3 (MergeMany). Differs: members go in
    ascending order, not a random one, and start from their fit to the dominant expert, not as
    stored, so that members in arbitrary orders do not begin with a mean of nothing in common.
    """
    order = aligner.orders(bank, labels, dominants)
    many = [members for members in members_of(labels) if len(members) > 2]

    def solve(members: list[int]) -> Tensor:
        ids = torch.tensor(members)
        return _group_order(select(bank, ids).map(Tensor.float), order[ids], aligner)

    if not many:
        return order
    with ThreadPoolExecutor(aligner.at_once(bank.hidden_size, len(many))) as pool:
        for members, found in zip(many, pool.map(solve, many), strict=True):
            order[members] = found
    return order


def _group_order(
    bank: ExpertBank, order: Int[Tensor, "M F"], aligner: Aligner
) -> Int[Tensor, "M F"]:
    order = order.clone()
    M = bank.num_experts
    for _ in range(ROUNDS):
        changed = False
        for member in range(M):
            others = [m for m in range(M) if m != member]
            mean = permute_hidden(select(bank, torch.tensor(others)), order[others])
            pair = mean.map(lambda t: t.mean(0, keepdim=True))
            own = select(bank, torch.tensor([member])).tensors()
            pair = pair.replaced({n: torch.cat([t, own[n]]) for n, t in pair.tensors().items()})
            cost = weight_cost(pair, 0, 1)
            ((_, found),) = aligner.solve(pair, [(0, 1)], lambda *_, cost=cost: cost)
            gain = _fit(cost, found) - _fit(cost, order[member])
            if gain > _GAIN * abs(_fit(cost, found)):
                order[member], changed = found, True
        if not changed:
            break
    return order


def _fit(cost: Tensor, order: Tensor) -> float:
    """The sum of the entries that an order chooses."""
    return float(cost.gather(1, order.to(cost.device)[:, None]).sum(dtype=torch.float64))
