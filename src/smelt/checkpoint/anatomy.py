"""What in a checkpoint depends on the number of experts, read off transformers' own classes.

The model is built a second time with twice the experts: whatever changes shape has an expert axis
(router rows, router bias, selection bias), so no family needs a list of such tensors.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from smelt.checkpoint import skeleton
from smelt.checkpoint.bind import MoeLayer, expert_axes, find_layers, set_num_experts
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError

_UNBUILT = re.compile(r"(.*?\.)?mtp[^.]*\.|.*?layers\.\d+\.")


@dataclass(frozen=True)
class Anatomy:
    """The MoE layers of a checkpoint and the tensors that belong to them."""

    layers: list[MoeLayer]
    experts: dict[str, list[str]]  # by layer: state names of its experts
    axes: dict[str, dict[str, int]]  # by layer: other tensors with an expert axis, and the axis
    mtp_keys: list[str] = field(default_factory=list)  # multi-token-prediction keys with experts

    def layers_of(self, block: str) -> list[MoeLayer]:
        return [layer for layer in self.layers if layer.block == block]


def dissect(checkpoint: Checkpoint) -> Anatomy:
    """The anatomy of a checkpoint, from its skeleton and one of twice the experts.

    Raises:
        CheckpointError: no experts, or a family whose expert count smelt cannot change.
    """
    layers = find_layers(checkpoint.model)
    changing = _axes(checkpoint, layers)
    experts = {layer.name: _expert_names(checkpoint, layer, changing) for layer in layers}
    _refuse_shared(checkpoint, experts)
    axes: dict[str, dict[str, int]] = {layer.name: {} for layer in layers}
    for name, axis in changing.items():
        if any(name.startswith(layer.experts + ".") for layer in layers):
            continue
        owner = max(
            (layer for layer in layers if name.startswith(layer.name + ".")),
            key=lambda layer: len(layer.name),
            default=None,
        )
        if owner is None:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has a row per expert but lies outside every MoE "
                "layer. docs/add-a-family.md says how such a family is added."
            )
        axes[owner.name][name] = axis
    return Anatomy(layers, experts, axes, _mtp_keys(checkpoint))


def _expert_names(checkpoint: Checkpoint, layer: MoeLayer, axes: dict[str, int]) -> list[str]:
    """The experts' own tensors; what all experts share (a norm after them) is not one."""
    inside = [n for n in checkpoint.layout if n.startswith(layer.experts + ".")]
    if layer.num_stored != layer.num_experts:
        return inside
    return [n for n in inside if n in axes or n.startswith(f"{layer.experts}.expert_")]


def _refuse_shared(checkpoint: Checkpoint, experts: dict[str, list[str]]) -> None:
    """Two layers with the same experts cannot be grouped apart."""
    owner: dict[str, str] = {}
    for layer, names in experts.items():
        for name in names:
            other = owner.setdefault(checkpoint.stored_name(name) or name, layer)
            if other != layer:
                raise CheckpointError(
                    f"{checkpoint.folder}: {other} and {layer} share their experts. smelt groups "
                    "the experts of each layer by what that layer does, so it cannot compress such "
                    "a model."
                )


def _axes(checkpoint: Checkpoint, layers: list[MoeLayer]) -> dict[str, int]:
    count = layers[0].num_experts
    odd = next((layer for layer in layers if layer.num_experts != count), None)
    if odd is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: {odd.name} has {odd.num_experts} experts, {layers[0].name} has "
            f"{count}. smelt reads families with one expert count for all layers."
        )
    doubled = skeleton.build(
        checkpoint.cls, resized(checkpoint.config, count, 2 * count), checkpoint.dtype
    )
    if any(layer.num_experts != 2 * count for layer in find_layers(doubled)):
        raise CheckpointError(
            f"{checkpoint.folder}: no configuration field of family "
            f"{checkpoint.config.model_type!r} is known to set its {count} experts. "
            "docs/add-a-family.md says how one is named."
        )
    return expert_axes(checkpoint.state, dict(doubled.state_dict()))


def resized(config: PreTrainedConfig, before: int, after: int) -> PreTrainedConfig:
    """The configuration with `after` experts per layer."""
    return set_num_experts(config, before, after)


def _mtp_keys(checkpoint: Checkpoint) -> list[str]:
    """Keys of layers that transformers does not build and that hold experts of their own.

    Multi-token prediction, under a name of its own or as one layer more than there are.
    """
    extra = set(checkpoint.extra_keys)
    used = [key for key in checkpoint.tensors if key not in extra]
    matches = {_UNBUILT.match(key) for key in extra if ".experts." in key}
    prefixes = {match[0] for match in matches if match}
    unbuilt = tuple(p for p in prefixes if not any(key.startswith(p) for key in used))
    return [key for key in checkpoint.extra_keys if key.startswith(unbuilt)]


def num_params(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """Parameters under these state names, tied ones counted once."""
    stored = {checkpoint.stored_name(n) for n in names} - {None}
    return sum(math.prod(checkpoint.state[n].shape) for n in stored if n is not None)


def stored_bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """Bytes that these tensors take on disk when written unquantised in their own types."""
    stored = {checkpoint.stored_name(n) for n in names} - {None}
    total = 0
    for name in stored:
        assert name is not None
        key = checkpoint.layout[name].all_keys()[0]
        total += math.prod(checkpoint.state[name].shape) * checkpoint.tensors[key].dtype.itemsize
    return total
