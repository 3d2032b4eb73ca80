"""How the members of a group become one expert: the merge rules, and their carrying out."""

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor

from smelt.compress.fisher import fisher_merge
from smelt.compress.least_squares import least_squares
from smelt.compress.members import Rule, groups_of, weighted_sum
from smelt.compress.merge import merge_groups
from smelt.compress.regmean import regmean
from smelt.compress.repair import repair
from smelt.compress.subspace import subspace
from smelt.compress.zipit import zipit
from smelt.experts import ExpertBank
from smelt.plugins import find
from smelt.routing import LayerStats

RULES: dict[str, Rule] = {
    "sum": weighted_sum,
    "fisher": fisher_merge,
    "regmean": regmean,
    "zipit": zipit,
    "least-squares": least_squares,
    "subspace": subspace,
}
"""From members, aligned and weighted, to one expert."""

NEEDS_GRADIENTS = ("fisher",)
OWN_ORDER = ("zipit",)
"""Rules that match hidden units by themselves: alignment and REPAIR say nothing to them."""


def merge_by(
    bank: ExpertBank,
    labels: Int[Tensor, " E"],
    weights: Float[Tensor, " E"],
    *,
    rule: str = "sum",
    repaired: bool = False,
    order: Int[Tensor, "E F"] | None = None,
    stats: LayerStats | None = None,
    fisher: Mapping[str, Tensor] | None = None,
) -> ExpertBank:
    """G experts, each made of its group's members by a rule; cast once, to the bank's type.

    Args:
        labels: group of each expert, every group inhabited; -1: the expert is left out.
        weights: of each member; every group sums to 1.
        rule: a name in RULES, or "module:function".
        repaired: renormalise the hidden units' statistics afterwards (`repair`).
        order: hidden units of each expert as its group's reference has them.
        stats: where a rule's tokens come from; the plain sum needs none.
        fisher: squared gradients of all experts, by the names of the bank's tensors.

    A group of one is a copy, bit for bit.
    """
    make = find(RULES, rule, "rule")
    if make is weighted_sum and not repaired:
        return merge_groups(bank, labels, weights, order)
    groups = groups_of(bank, labels, weights, order=order, stats=stats, fisher=fisher)
    count = int(labels.max()) + 1
    out = bank.map(lambda t: t.new_empty(count, *t.shape[1:]))
    for number, (members, group) in enumerate(groups):
        if group is None:
            made = bank.map(lambda t, e=members[0]: t[e : e + 1])  # type: ignore[misc]
        else:
            made = make(group)
            made = repair(made, group) if repaired else made
        for name, tensor in made.tensors().items():
            out.tensors()[name][number].copy_(tensor[0])
    return out


def needs_tokens(rule: str, *, repaired: bool) -> bool:
    """Whether carrying out the rule reads the input sample; outside code is taken to do so."""
    return repaired or rule not in ("sum", "fisher", "subspace")
