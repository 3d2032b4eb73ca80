"""Which experts each MoE layer sees: the sharing rules, as data.

A *group* of experts is stored once: `entries` pool entries of `experts` experts each. A MoE layer
uses all entries of one group, and the first `experts` experts of every entry.
"""

from dataclasses import dataclass
from typing import Protocol

SHARING = {
    "pool": "SaMoE: one pool of P entries, each layer its own combination of them",
    "none": "AR-MoE: every layer has experts of its own",
    "all": "one expert layer for all layers (share-all, WideNet)",
    "groups": "P expert layers, each shared by consecutive layers",
    "bottom": "the first half of the layers shares one expert layer, the others have their own",
    "top": "the last half of the layers shares one expert layer, the others have their own",
    "pyramid": "one expert layer for all; the first half of the layers sees half of its experts",
    "residual": "PR-MoE: own experts, half as many in the first half, beside a dense FFN",
    "union": "UniPool: one pool, each router chooses among all of its P·E experts",
    "dense": "no experts: a dense FFN in every block",
}
"""What `SaMoEConfig.sharing` can be."""


class Sizes(Protocol):
    """The settings that layout and counts are made from; `SaMoEConfig` says what they mean."""

    sharing: str
    mix: str
    alpha_scope: str
    use_beta: bool
    shared_router: bool
    vocab_size: int
    hidden_size: int
    intermediate_size: int | None
    moe_intermediate_size: int | None
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    head_dim: int | None
    moe_every: int
    num_experts: int
    num_experts_per_tok: int
    pool_size: int
    norm: str
    position_embedding: str
    max_position_embeddings: int
    is_gated: bool
    has_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool


@dataclass(frozen=True)
class Group:
    """Experts stored once: P `entries` of E `experts`, used by the MoE layers `layers`."""

    entries: int
    experts: int
    layers: tuple[int, ...]

    @property
    def is_shared(self) -> bool:
        return len(self.layers) > 1


@dataclass(frozen=True)
class Layer:
    """One MoE layer: its block, its group, and how many experts its router has."""

    block: int
    group: int
    experts: int


@dataclass(frozen=True)
class Layout:
    """The groups of experts of a model and the MoE layers that use them."""

    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    is_mixed: bool  # layers have α: SaMoE with soft mixing
    has_dense_residual: bool

    def shared(self) -> list[int]:
        """The groups that more than one layer uses, in order; the others live in their block."""
        return [i for i, group in enumerate(self.groups) if group.is_shared]


def moe_blocks(sizes: Sizes) -> list[int]:
    """The blocks with experts: the last of every `moe_every`."""
    if sizes.sharing == "dense":
        return []
    every = sizes.moe_every
    return [i for i in range(sizes.num_hidden_layers) if i % every == every - 1]


def make_layout(sizes: Sizes) -> Layout:
    """The layout that a configuration's sharing rule means."""
    blocks = moe_blocks(sizes)
    num_layers = len(blocks)
    half = num_layers // 2
    E, P = sizes.num_experts, sizes.pool_size
    rule = "groups" if sizes.sharing == "pool" and sizes.mix == "hard" else sizes.sharing
    experts = [E] * num_layers
    if rule in ("pyramid", "residual"):
        experts = [max(1, E // 2)] * half + [E] * (num_layers - half)
    if rule == "union":
        experts = [P * E] * num_layers
    group_of = {
        "groups": [layer * P // max(num_layers, 1) for layer in range(num_layers)],
        "bottom": [max(0, layer - max(half - 1, 0)) for layer in range(num_layers)],
        "top": [min(layer, half) for layer in range(num_layers)],
        "none": list(range(num_layers)),
        "residual": list(range(num_layers)),
    }.get(rule, [0] * num_layers)
    groups = []
    for group in sorted(set(group_of)):
        users = tuple(layer for layer in range(num_layers) if group_of[layer] == group)
        entries = P if rule == "pool" else 1
        groups.append(Group(entries, max(experts[layer] for layer in users), users))
    return Layout(
        groups=tuple(groups),
        layers=tuple(
            Layer(block, group, count)
            for block, group, count in zip(blocks, group_of, experts, strict=True)
        ),
        is_mixed=rule == "pool",
        has_dense_residual=rule == "residual",
    )
