"""Sub-MoE's rule: members share the left factors of a joint SVD, their right factors are merged."""

import torch

from smelt.compress.members import Group, weighted_sum
from smelt.experts import ExpertBank


def subspace(group: Group) -> ExpertBank:
    """Per matrix: [W_1 … W_M] = U Σ [V_1 … V_M]ᵀ, of which U Σ (Σ_m w_m V_m)ᵀ is kept.

    As many directions are kept as one member can have: the result is the weighted sum, projected on
    the directions of output that the members have most in common. A matrix that is no taller than
    wide has no more than those, and becomes the weighted sum itself. Biases are the weighted mean.

    Source: Sub-MoE, arXiv:2506.23266; how many directions are kept is ours.
    """
    mean = weighted_sum(group)
    found = {}
    for name, stack in group.bank.tensors().items():
        if stack.dim() != 3 or stack.shape[1] <= stack.shape[2]:
            continue
        side_by_side = torch.cat(list(stack), dim=1).double()
        _, vectors = torch.linalg.eigh(side_by_side @ side_by_side.T)
        u = vectors[:, -stack.shape[2] :].to(stack.dtype)  # of the largest eigenvalues
        found[name] = (u @ (u.T @ mean.tensors()[name][0]))[None]
    return mean.replaced(found)
