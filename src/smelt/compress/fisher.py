"""Fisher merging: every weight by how sure each member is of it."""

import torch
from torch import Tensor

from smelt.compress.members import Group
from smelt.errors import PlanError
from smelt.experts import ExpertBank


def fisher_merge(group: Group) -> ExpertBank:
    """Element by element, Σ_m w_m F_m θ_m / Σ_m w_m F_m.

    F is the diagonal of the empirical Fisher information: squared gradients of each sequence's
    likelihood, summed over the calibration sequences. Its scale does not matter. Where it is 0 for
    all members (an input that no token had, a group that no token reached), the weighted mean.

    Source: Matena and Raffel, arXiv:2111.09832, Eq. 4. Differs from their code in that a weight
    nobody is sure of is the weighted mean and not the first member's (there is no ε and no floor).
    """
    if group.fisher is None:
        raise PlanError(
            "the rule fisher needs gradients, and the statistics hold none. Calibrate with "
            "--gradients."
        )
    fisher = group.fisher

    def merge(name: str, value: Tensor) -> Tensor:
        top = torch.zeros(value.shape[1:], dtype=torch.float64, device=value.device)
        total, mean = torch.zeros_like(top), torch.zeros_like(top)
        for member, weight in enumerate(group.weights.tolist()):
            own = value[member].double()
            sure = fisher[name][member].to(own) * weight
            top.addcmul_(sure, own)
            total += sure
            mean.add_(own, alpha=weight)
        return torch.where(total > 0, top / total, mean).float()[None]

    return group.bank.replaced({n: merge(n, t) for n, t in group.bank.tensors().items()})
