"""What a plan must know of a checkpoint, from its headers alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from smelt.checkpoint.anatomy import Anatomy, dissect, num_params, stored_bytes
from smelt.checkpoint.bind import MoeLayer, read_bank
from smelt.checkpoint.source import Checkpoint
from smelt.compress.plan import LayerFacts
from smelt.experts import ExpertBank


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
    beside_params = beside_bytes = 0  # what routers score beside the experts
    for layer in anatomy.layers:
        experts, axes = anatomy.experts[layer.name], anatomy.axes[layer.name]
        stored = [n for n in experts if not n.endswith((".expert_map", ".constants"))]
        module = checkpoint.model.get_submodule(layer.experts)
        bank = read_bank(module, layer.experts, checkpoint.state.__getitem__)
        belonging.update(experts, axes)
        rows = {name: checkpoint.state[name].shape[axis] for name, axis in axes.items()}
        row_params = sum(num_params(checkpoint, [name]) // n for name, n in rows.items())
        row_bytes = sum(stored_bytes(checkpoint, [name]) // n for name, n in rows.items())
        beside_params += num_params(checkpoint, axes) - layer.num_experts * row_params
        beside_bytes += stored_bytes(checkpoint, axes) - layer.num_experts * row_bytes
        layers.append(
            LayerFacts(
                name=layer.name,
                block=blocks.index(layer.block) if layer.block in blocks else 0,
                num_experts=layer.num_experts,
                top_k=layer.top_k,
                model_size=bank.model_size,
                hidden_size=bank.hidden_size,
                expert_params=sum(t[0].numel() for t in bank.tensors().values()),
                expert_bytes=stored_bytes(checkpoint, stored) // layer.num_stored,
                num_router_params=row_params,
                router_bytes=row_bytes,
                map_bytes=4,
                n_group=layer.n_group,
                topk_group=layer.topk_group,
                min_per_router_group=layer.min_per_group,
                has_gate=bank.gate is not None,
                bias_params=sum(t[0].numel() for n, t in bank.tensors().items() if "bias" in n),
            )
        )
    others = [n for n in checkpoint.layout if n not in belonging]
    kept_extra = set(checkpoint.extra_keys) - set(anatomy.mtp_keys)
    extra_bytes = sum(checkpoint.tensors[key].num_bytes for key in kept_extra)
    return Facts(
        anatomy,
        layers,
        num_params(checkpoint, others) + beside_params,
        stored_bytes(checkpoint, others) + beside_bytes + extra_bytes,
    )


def bank_reader(checkpoint: Checkpoint, facts: Facts) -> Callable[[str], ExpertBank]:
    """Reads the experts of a layer by the layer's name."""
    by_name = {layer.name: layer for layer in facts.anatomy.layers}

    def read(name: str) -> ExpertBank:
        path = by_name[name].experts
        return read_bank(checkpoint.model.get_submodule(path), path, checkpoint.read)

    return read


def router_reader(checkpoint: Checkpoint, facts: Facts) -> Callable[[str], Tensor | None]:
    """Reads the router rows [E, D] of a layer by the layer's name."""
    by_name = {layer.name: layer for layer in facts.anatomy.layers}

    def read(name: str) -> Tensor | None:
        axes = facts.anatomy.axes[name]
        if by_name[name].router is None or not axes:
            return None
        shapes = {n: checkpoint.state[n] for n in axes}
        rows = checkpoint.read(router_names(by_name[name], shapes)[0])
        return rows[: by_name[name].num_experts]

    return read


def router_names(layer: MoeLayer, values: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """The router's matrix, and its additive bias if it has one (a selection bias is not one)."""
    prefix = f"{layer.router}."
    matrix = next(n for n, v in values.items() if v.dim() == 2 and n.startswith(prefix))
    bias = matrix.removesuffix("weight") + "bias"
    return matrix, bias if bias in values else None
