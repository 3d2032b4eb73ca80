"""The members of one group, ready to become one expert: what every merge rule is given."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smelt.experts import HIDDEN_AXIS, ExpertBank, hidden, permute_hidden, select
from smelt.routing import LayerStats


@dataclass(frozen=True)
class Group:
    """Experts that become one, and the sampled tokens that chose any of them.

    Shapes: M members, T tokens.
    """

    bank: ExpertBank  # float32, hidden units in the order the alignment gives
    weights: Float[Tensor, " M"]  # sum to 1
    x: Float[Tensor, "T D"]  # float32, in the order of the sample
    is_routed: Bool[Tensor, "T M"]  # whether the token chose that very member
    gate: Float[Tensor, "T M"]  # with what weight; 0 where it did not
    fisher: Mapping[str, Tensor] | None = None  # as the bank's tensors; None: not at hand

    def tokens(self, member: int) -> Float[Tensor, "T2 D"]:
        """The tokens that chose this member."""
        return self.x[self.is_routed[:, member]]

    def hidden(self) -> Float[Tensor, "M T F"]:
        """The hidden activations of every member on all tokens of the group."""
        return torch.stack([hidden(self.bank, m, self.x) for m in range(self.bank.num_experts)])


Rule = Callable[[Group], ExpertBank]
"""How the members become one: a bank of one expert, float32."""


def weighted_sum(group: Group) -> ExpertBank:
    """Σ_m w_m · member m, tensor by tensor."""
    weights = group.weights.float()
    return group.bank.map(
        lambda t: torch.einsum("m,m...->...", weights.to(t.device), t.float())[None]
    )


def groups_of(
    bank: ExpertBank,
    labels: Int[Tensor, " E"],
    weights: Float[Tensor, " E"],
    *,
    order: Int[Tensor, "E F"] | None,
    stats: LayerStats | None,
    fisher: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[list[int], Group | None]]:
    """The members of each group in turn, and the group; None for a group of one.

    Args:
        order: hidden units of each expert as its group's reference has them (`align`).
        stats: whose input sample the tokens are; None: no tokens.
        fisher: of every expert, as the bank's tensors, in stored order.

    In memory besides the bank: one group in float32.
    """
    for members in members_of(labels):
        if len(members) == 1:
            yield members, None
            continue
        ids = torch.tensor(members)
        own = None if order is None else order[ids]
        found = _ordered(select(bank, ids).map(Tensor.float), own)
        x, is_routed, gate = _tokens(stats, ids, found)
        about = None
        if fisher is not None:
            about = {n: _reordered(n, fisher[n][ids.to(fisher[n].device)], own) for n in fisher}
        yield members, Group(found, weights[ids], x, is_routed, gate, about)


def members_of(labels: Int[Tensor, " E"]) -> list[list[int]]:
    """The experts of each group, ascending; an empty group is a fault of ours."""
    groups: list[list[int]] = [[] for _ in range(int(labels.max()) + 1)]
    for expert, group in enumerate(labels.tolist()):
        if group >= 0:
            groups[group].append(expert)
    assert all(groups), f"a group without members in {labels.tolist()}"
    return groups


def _tokens(
    stats: LayerStats | None, ids: Int[Tensor, " M"], bank: ExpertBank
) -> tuple[Tensor, Tensor, Tensor]:
    """The sampled tokens that chose a member, which of the members each chose, and its weight.

    A choice of weight 0 is none: so a router says that it wants no expert.
    """
    if stats is None:
        none = torch.zeros(0, len(ids))
        return bank.up.new_zeros(0, bank.model_size), none.bool(), none
    choice = stats.sample_choice.masked_fill(stats.sample_weight == 0, -1)
    chosen = choice[:, :, None] == ids
    gate = (chosen * stats.sample_weight[:, :, None].float()).sum(1)
    is_routed = chosen.any(1)
    is_here = is_routed.any(1)
    return stats.input_sample[is_here].to(bank.up), is_routed[is_here], gate[is_here]


def _ordered(bank: ExpertBank, order: Int[Tensor, "M F"] | None) -> ExpertBank:
    return bank if order is None else permute_hidden(bank, order)


def _reordered(name: str, tensor: Tensor, order: Int[Tensor, "M F"] | None) -> Tensor:
    """One tensor of several experts, hidden units reordered."""
    if order is None or name not in HIDDEN_AXIS:
        return tensor
    axis = HIDDEN_AXIS[name]
    rows = zip(tensor, order.to(tensor.device), strict=True)
    return torch.stack([t.index_select(axis, o) for t, o in rows])
