"""The parameters of a model by what they do: experts, routers, attention, dense FFNs, the rest.

Every parameter belongs to one part, so that squared gradient norms of the parts add up to those of
the model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from smelt.analyse.moments import Moments, Signal
from smelt.checkpoint.bind import MoeLayer, find_layers, is_common
from smelt.checkpoint.skeleton import outermost_blocks
from smelt.samoe.backbone import SaMoEModel
from smelt.samoe.blocks import DenseMLP, SaMoEBlock
from smelt.samoe.moe import SaMoELayer
from smelt.samoe.pool import ExpertPool

EXPERT_TENSORS = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


@dataclass
class Part:
    """Some parameters, and the moments of their gradients.

    Experts are cut into units [E, P]: one per expert of one pool entry. Other parts are one unit.
    """

    kind: str  # experts, router, attention, dense, mixing (α, β), norms, embeddings, other
    parameters: dict[str, nn.Parameter]
    block: int | None = None  # the block it lies in; None: outside, or shared by several
    layers: tuple[int, ...] = ()  # the MoE layers that use it
    entries: int | None = None  # P; None: no experts
    moments: dict[str, Moments] = field(default_factory=dict)

    @property
    def num_values(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def add(self, gradients: dict[str, Tensor | None]) -> None:
        """Take in the gradients of one micro-batch; None is a gradient of zero."""
        for name, parameter in self.parameters.items():
            gradient = gradients.get(name)
            one = self.moments.setdefault(name, Moments())
            if gradient is None:
                one.add_zero(self.cut(name, parameter))
            else:
                one.add(self.cut(name, gradient))

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the part as one row per unit: [E, P, W], or [W]."""
        if self.entries is None:
            return tensor.flatten()
        return cut_experts(name, tensor, self.entries)

    def signal(self) -> Signal:
        """What the gradients so far say, per unit."""
        return Signal.of(*self.moments.values())


def cut_experts(name: str, tensor: Tensor, entries: int) -> Tensor:
    """A tensor of experts as a row of values per expert and pool entry [E, P, W].

    Of a pool the hidden units c·F … (c+1)·F belong to entry c: rows of up and gate, columns of
    down.
    """
    E = tensor.shape[0]
    if name == "down":
        return tensor.view(E, tensor.shape[1], entries, -1).transpose(1, 2).flatten(2)
    return tensor.reshape(E, entries, -1)


def find_parts(model: PreTrainedModel) -> list[Part]:
    """The parts of a model that train, in the order of its blocks."""
    base = model.base_model
    parts = _of_samoe(base) if isinstance(base, SaMoEModel) else _of_stock(model)
    parts = [part for part in map(_trained, parts) if part.parameters]
    known = {id(p) for part in parts for p in part.parameters.values()}
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in known}
    return [*parts, Part("other", rest)] if rest else parts


def _trained(part: Part) -> Part:
    part.parameters = {n: p for n, p in part.parameters.items() if p.requires_grad}
    return part


def _named(modules: Iterable[nn.Module | None]) -> dict[str, nn.Parameter]:
    found = {}
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters() if module is not None else ():
            found[f"{number}.{name}"] = parameter
    return found


def experts_part(pool: ExpertPool, layers: Sequence[int], block: int | None) -> Part:
    """The experts of a pool."""
    tensors = {name: getattr(pool, name) for name in EXPERT_TENSORS}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Part("experts", present, block, tuple(layers), pool.entries)


def _of_samoe(base: SaMoEModel) -> list[Part]:
    layout = base.config.layout
    heads = [base.embed_tokens, base.embed_positions]
    parts = [Part("embeddings", _named(heads)), Part("norms", _named([base.norm]))]
    for pool, group in zip(base.pools, layout.shared(), strict=True):
        users = layout.groups[group].layers
        parts.append(experts_part(cast(ExpertPool, pool), users, None))
    if base.router is not None:
        parts.append(Part("router", _named([base.router]), None, tuple(range(len(layout.layers)))))
    for number, block in enumerate(cast("Iterable[SaMoEBlock]", base.layers)):
        norms = [block.attention_norm, block.mlp_norm]
        parts += [
            Part("attention", _named([block.attention]), number),
            Part("norms", _named(norms), number),
        ]
        dense = [one for one in (block.mlp, block.residual) if isinstance(one, DenseMLP)]
        if dense:
            parts.append(Part("dense", _named(dense), number))
        if isinstance(block.mlp, SaMoELayer):
            parts += _of_layer(block.mlp, number)
    return parts


def _of_layer(layer: SaMoELayer, block: int) -> list[Part]:
    own = (layer.index,)
    mixing = {n: p for n, p in (("alpha", layer.alpha), ("beta", layer.beta)) if p is not None}
    parts = [
        Part("router", _named([layer.router]), block, own),
        Part("mixing", mixing, block, own),
    ]
    if layer.pool is not None:
        parts.append(experts_part(layer.pool, own, block))
    return parts


def _of_stock(model: PreTrainedModel) -> list[Part]:
    """Of a stock family: experts and routers where they are found, the rest by block."""
    blocks = list(outermost_blocks(model))
    parts: list[Part] = []
    for number, layer in enumerate(find_layers(model)):
        block, own = blocks.index(layer.block), (number,)
        experts = model.get_submodule(layer.experts)
        if is_common(experts):
            parts.append(Part("experts", _expert_rows(experts, layer), block, own, 1))
        if layer.router is not None:
            parts.append(Part("router", _named([model.get_submodule(layer.router)]), block, own))
    known = {id(p) for part in parts for p in part.parameters.values()}
    for number, name in enumerate(blocks):
        inside = _named([model.get_submodule(name)])
        rest = {n: p for n, p in inside.items() if id(p) not in known}
        parts.append(Part("other", rest, number))
    return parts


def _expert_rows(module: Any, layer: MoeLayer) -> dict[str, nn.Parameter]:
    named = module.named_parameters()
    return {f"own.{n}": p for n, p in named if p.shape[:1] == (layer.num_stored,)}
