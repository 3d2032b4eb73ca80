"""Which expert joins which group: a label per expert, 0..G-1, or -1 for an expert that is dropped.

Groups are numbered by ascending dominant id, so that the kept rows of a router stay in order.
"""

from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smelt.errors import PlanError

DROPPED = -1
"""The label of an expert that no group takes."""


def join_most_similar(
    similarity: Float[Tensor, "E E"],
    dominants: Int[Tensor, " G"],
    *,
    protected: Collection[int] = (),
    router_groups: int = 1,
) -> Int[Tensor, " E"]:
    """Groups in which every other expert joins the dominant most similar to it; ties: lower id.

    Args:
        dominants: expert ids, ascending; group g is that of dominants[g].
        protected: dominants that nobody joins.
        router_groups: runs of E/router_groups experts that no group may cross. A stock checkpoint
            of a group-limited router (deepseek_v3) needs it: there the merged expert answers for
            its members inside one router group. The mapped form keeps all router rows, so its
            groups may cross (1).

    Source: M-SMoE, arXiv:2310.01334, section 3.1. Differs from the authors' code, which takes a
    dominant's rank for its id when it groups.
    """
    num_experts, size = len(similarity), len(similarity) // router_groups
    labels = _labels_of(dominants, num_experts)
    ids = dominants.numpy()
    free = ~np.isin(ids, list(protected))
    for start in range(0, num_experts, size):
        near = np.flatnonzero(free & (ids >= start) & (ids < start + size))
        rest = [e for e in range(start, start + size) if labels[e] == DROPPED]
        if not rest:
            continue
        if not len(near):
            raise PlanError(
                f"experts {rest} have no group to join: every kept expert there is protected. "
                "Keep more experts, or protect fewer."
            )
        candidates = similarity[rest][:, ids[near].tolist()].numpy()
        labels[rest] = torch.from_numpy(near[candidates.argmax(1)])  # numpy: the first of equals
    return labels


def drop_others(dominants: Int[Tensor, " G"], num_experts: int) -> Int[Tensor, " E"]:
    """Every dominant alone in its group, every other expert dropped: pruning, as labels."""
    return _labels_of(dominants, num_experts)


def _labels_of(dominants: Int[Tensor, " G"], num_experts: int) -> Int[Tensor, " E"]:
    labels = torch.full((num_experts,), DROPPED, dtype=torch.int64)
    labels[dominants] = torch.arange(len(dominants))
    return labels
