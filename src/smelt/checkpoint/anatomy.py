"""What in a checkpoint depends on the number of experts, read off transformers' own classes.

The model is built a second time with twice the experts: whatever changes shape has an expert axis
(router rows, router bias, selection bias), so no family needs a list of such tensors.
"""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedConfig

from smelt.checkpoint import skeleton
from smelt.checkpoint.bind import MoeLayer, find_layers
from smelt.checkpoint.factored import is_factored
from smelt.checkpoint.families import COUNT_FIELDS
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
    module = checkpoint.model.get_submodule(layer.experts)
    if is_factored(module):
        own = {f"{layer.experts}.{n}" for n in (*module._parameters, *module._buffers)}
        return [n for n in inside if n in own]
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
    return _expert_axes(checkpoint.state, dict(doubled.state_dict()))


def resized(config: PreTrainedConfig, before: int, after: int) -> PreTrainedConfig:
    """A copy of the configuration with `after` experts per layer, wherever it said `before`."""
    config = copy.deepcopy(config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        fields = [n for n in COUNT_FIELDS if getattr(part, n, None) == before]
        for name in fields:
            setattr(part, name, after)
    return config


def _expert_axes(state: Mapping[str, Tensor], doubled: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensors with an expert axis, and which: read off the same model with twice the experts."""
    axes = {}
    for name, tensor in state.items():
        if name in doubled and doubled[name].shape != tensor.shape:
            pairs = list(zip(tensor.shape, doubled[name].shape, strict=True))
            axes[name] = next(i for i, (n, m) in enumerate(pairs) if n != m)
    return axes


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
    """Parameters under these state names, tied ones counted once; numbers of rows are none."""
    stored = {checkpoint.stored_name(n) for n in names} - {None}
    found = [checkpoint.state[n] for n in stored if n is not None]
    return sum(math.prod(t.shape) for t in found if t.is_floating_point())


def stored_bytes(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """Bytes that these tensors take on disk when written unquantised in their own types."""
    stored = {checkpoint.stored_name(n) for n in names} - {None}
    total = 0
    for name in stored:
        assert name is not None
        key = checkpoint.layout[name].all_keys()[0]
        total += math.prod(checkpoint.state[name].shape) * checkpoint.tensors[key].dtype.itemsize
    return total
