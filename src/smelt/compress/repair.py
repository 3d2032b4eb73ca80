"""REPAIR: hidden units of a merged expert vary as much as those of its members did."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from smelt.compress.members import Group
from smelt.experts import ExpertBank


def repair(merged: ExpertBank, group: Group) -> ExpertBank:
    """The merged expert with the statistics of its pre-activations set to its members' average.

    Over the sampled tokens that chose any member, every row of `up` (and of `gate`, by itself) is
    scaled so that the standard deviation of its output is Σ_m w_m σ_m. Where the family has a bias
    beside that matrix, the bias is then set so that the mean is Σ_m w_m μ_m; where it has none
    (Switch, and almost every gated family), the row is only scaled, so the mean scales with it. The
    output of `down` stays as it is. A row that does not vary is left alone, and so is a group with
    fewer than two tokens.

    Args:
        merged: one expert whose hidden unit i is that of every member (`align`).

    Source: Jordan et al., arXiv:2211.08403, section 4. Differs in that the correction is folded
    into the weights at once, and in the missing biases.
    """
    if len(group.x) < 2:
        return merged
    changed: dict[str, Tensor] = {}
    for name in ("up", "gate"):
        weight = merged.tensors().get(name)
        if weight is None:
            continue
        members = group.bank.tensors()
        biases, bias = members.get(f"{name}_bias"), merged.tensors().get(f"{name}_bias")
        found = [
            _moments(group.x, members[name][m], None if biases is None else biases[m])
            for m in range(group.bank.num_experts)
        ]
        w = group.weights.tolist()
        mean = sum((a * mu for a, (mu, _) in zip(w, found, strict=True)), torch.zeros(()))
        deviation = sum((a * sd for a, (_, sd) in zip(w, found, strict=True)), torch.zeros(()))
        own_mean, own = _moments(group.x, weight[0], None if bias is None else bias[0])
        scale = torch.where(own > 0, deviation / own, 1.0)
        changed[name] = (weight[0].double() * scale[:, None]).to(weight)[None]
        if bias is not None:
            shifted = scale * (bias[0].double() - own_mean) + mean
            changed[f"{name}_bias"] = shifted.to(bias)[None]
    return merged.replaced(changed)


def _moments(
    x: Float[Tensor, "T D"], weight: Float[Tensor, "F D"], bias: Float[Tensor, " F"] | None
) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
    """Mean and standard deviation of each row's output over the tokens, float64."""
    z = linear(x, weight, bias).double()
    return z.mean(0), z.std(0, correction=0)
