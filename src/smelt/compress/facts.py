"""What a plan must know of a checkpoint, from its headers alone."""

from dataclasses import dataclass

from smelt.checkpoint.anatomy import Anatomy, dissect, num_params, stored_bytes
from smelt.checkpoint.bind import read_bank
from smelt.checkpoint.source import Checkpoint
from smelt.compress.plan import LayerFacts


@dataclass(frozen=True)
class Facts:
    """The MoE layers as a plan sees them, and the size of everything else."""

    anatomy: Anatomy
    layers: list[LayerFacts]
    other_params: int  # of everything that is neither an expert nor has an expert axis
    other_bytes: int


def read_facts(checkpoint: Checkpoint) -> Facts:
    """The facts of a checkpoint; no weights are read."""
    anatomy = dissect(checkpoint)
    blocks = [name for name in checkpoint.blocks if name]
    layers = []
    belonging: set[str] = set()
    for layer in anatomy.layers:
        experts, axes = anatomy.experts[layer.name], list(anatomy.axes[layer.name])
        stored = [n for n in experts if not n.endswith(".expert_map")]
        module = checkpoint.model.get_submodule(layer.experts)
        bank = read_bank(module, layer.experts, checkpoint.state.__getitem__)
        belonging.update(experts, axes)
        layers.append(
            LayerFacts(
                name=layer.name,
                block=blocks.index(layer.block) if layer.block in blocks else 0,
                num_experts=layer.num_experts,
                top_k=layer.top_k,
                model_size=bank.model_size,
                hidden_size=bank.hidden_size,
                expert_params=_per_expert(checkpoint, bank.tensors().values()),
                expert_bytes=_bytes_per_expert(checkpoint, stored, layer.num_stored),
                num_router_params=num_params(checkpoint, axes) // layer.num_experts,
                router_bytes=stored_bytes(checkpoint, axes) // layer.num_experts,
                map_bytes=4,
                n_group=layer.n_group,
                topk_group=layer.topk_group,
                min_per_router_group=1 if layer.is_softmax else 2,
            )
        )
    others = [n for n in checkpoint.layout if n not in belonging]
    kept_extra = set(checkpoint.extra_keys) - set(anatomy.mtp_keys)
    extra_bytes = sum(checkpoint.tensors[key].num_bytes for key in kept_extra)
    return Facts(
        anatomy,
        layers,
        num_params(checkpoint, others),
        stored_bytes(checkpoint, others) + extra_bytes,
    )


def _per_expert(checkpoint: Checkpoint, tensors: object) -> int:
    return sum(t[0].numel() for t in tensors)  # type: ignore[attr-defined]


def _bytes_per_expert(checkpoint: Checkpoint, names: list[str], count: int) -> int:
    """Bytes of one expert; tensors that all experts share (a norm after them) are left out."""
    total = 0
    for name in names:
        key = checkpoint.layout[name].all_keys()[0]
        shape = checkpoint.state[name].shape
        per_module = f".expert_" in name
        if per_module or shape[0] == count:
            total += shape.numel() * checkpoint.tensors[key].dtype.itemsize
    return total // count
