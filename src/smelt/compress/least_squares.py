"""MergeMoE's rule: up and gate averaged, then the down projection that answers for all members."""

import torch
from torch import Tensor

from smelt.compress.members import Group, weighted_sum
from smelt.experts import ExpertBank, hidden

RIDGE = 1e-3
"""Of the Gram, by its mean diagonal."""


def least_squares(group: Group) -> ExpertBank:
    """The weighted sum, its down projection changed so that the group's output is matched.

        min over W of Σ_t ‖ Σ_m g_tm f_m(x_t) − ĝ_t (W h(x_t) + b) ‖² + λ‖W − W̄‖²,    ĝ_t = Σ_m g_tm

    h are the hidden activations of the merged expert, W̄ and b the weighted means: what no token
    says anything about stays as the plain merge has it. Tokens are those of the sample that chose
    a member.

    Source: MergeMoE, arXiv:2510.14436. Differs in the ridge, towards the plain merge.
    """
    mean = weighted_sum(group)
    if not len(group.x):
        return mean
    total = group.gate.sum(1, keepdim=True).float()
    wanted = torch.zeros(len(group.x), mean.model_size, dtype=torch.float32)
    for member in range(group.bank.num_experts):
        wanted += group.gate[:, member, None].float() * _output(group.bank, member, group.x).cpu()
    h = hidden(mean, 0, group.x).float()
    left = wanted.to(h.device) - total.to(h.device) * _output(mean, 0, group.x)
    inputs = (total.to(h.device) * h).double()
    gram = inputs.T @ inputs
    scale = float(gram.diagonal().mean())
    if not scale > 0:
        return mean
    gram.diagonal().add_(RIDGE * scale)
    change = torch.cholesky_solve(inputs.T @ left.double(), torch.linalg.cholesky(gram))
    return mean.replaced({"down": mean.down + change.T[None].to(mean.down)})


def _output(bank: ExpertBank, expert: int, x: Tensor) -> Tensor:
    y = hidden(bank, expert, x) @ bank.down[expert].T
    return y if bank.down_bias is None else y + bank.down_bias[expert]
