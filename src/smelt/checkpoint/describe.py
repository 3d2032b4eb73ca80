"""What is in a checkpoint, in words and numbers: read off its headers and modules, no weights."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from smelt.checkpoint.anatomy import Anatomy, dissect, num_params
from smelt.checkpoint.bind import MoeLayer, is_module_dict
from smelt.checkpoint.factored import is_factored
from smelt.checkpoint.factored_forward import matrices
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.verify import known_sums, num_weight_files

PARTS = ("experts", "shared experts", "routers", "attention", "embeddings", "other")
"""What bytes are counted under; a part a checkpoint has not got is 0."""


@dataclass(frozen=True)
class Made:
    """What smelt did to make this folder, from its own notes."""

    form: str
    method: str
    source: str
    experts_before: list[int]  # per layer
    experts_after: list[int]
    bytes_before: int


@dataclass(frozen=True)
class Description:
    """A checkpoint described."""

    folder: str
    family: str
    architecture: str
    dtype: str
    quantised: str | None  # the format of the weights on disk, where they are quantised
    num_files: int
    num_checksums: int  # files whose SHA-256 is known: `verify` can tell damage
    num_params: int
    num_active_params: int  # per token: the chosen experts and all that is no expert
    num_bytes: int
    bytes_by_part: dict[str, int]
    num_blocks: int
    num_dense_blocks: int  # without a MoE layer
    layers: list[str]  # MoE layers by name
    num_experts: list[int]  # by layer, what its router chooses from
    num_stored: list[int]  # by layer, what there are weights for
    top_k: int
    router: str  # "softmax" or "sigmoid"
    n_group: int
    topk_group: int
    facts: list[str] = field(default_factory=list)
    made: Made | None = None

    def to_dict(self) -> dict[str, Any]:
        """The description as JSON can hold it."""
        return asdict(self)


def describe(checkpoint: Checkpoint, anatomy: Anatomy | None = None) -> Description:
    """The description of a checkpoint.

    Raises:
        CheckpointError: no experts, a family that is not covered, or weights that do not fit the
            configuration.
    """
    checkpoint.check()
    anatomy = anatomy or dissect(checkpoint)
    layers = anatomy.layers
    parts = _bytes_by_part(checkpoint, anatomy)
    blocks = [name for name in checkpoint.blocks if name]
    moe_blocks = {layer.block for layer in layers}
    total = num_params(checkpoint, checkpoint.layout)
    quantisation = checkpoint.config_dict.get("quantization_config") or {}
    return Description(
        folder=str(checkpoint.folder),
        family=str(checkpoint.config_dict.get("model_type")),
        architecture=checkpoint.cls.__name__,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        quantised=quantisation.get("quant_method"),
        num_files=num_weight_files(checkpoint.folder),
        num_checksums=len(known_sums(checkpoint.folder)),
        num_params=total,
        num_active_params=total - _idle_params(checkpoint, anatomy),
        num_bytes=sum(parts.values()),
        bytes_by_part=parts,
        num_blocks=len(blocks),
        num_dense_blocks=len([b for b in blocks if b not in moe_blocks]),
        layers=[layer.name for layer in layers],
        num_experts=[layer.num_experts for layer in layers],
        num_stored=[layer.num_stored for layer in layers],
        top_k=layers[0].top_k,
        router="softmax" if layers[0].is_softmax else "sigmoid",
        n_group=layers[0].n_group,
        topk_group=layers[0].topk_group,
        facts=_facts(checkpoint, anatomy),
        made=_made(checkpoint),
    )


def _idle_params(checkpoint: Checkpoint, anatomy: Anatomy) -> int:
    """Parameters of the experts that a token does not choose."""
    idle = 0
    for layer in anatomy.layers:
        stored = [
            n for n in anatomy.experts[layer.name] if not n.endswith((".expert_map", ".constants"))
        ]
        used = min(layer.top_k, layer.num_stored)
        share = num_params(checkpoint, stored) // layer.num_stored
        idle += share * (layer.num_stored - used)
    return idle


def _bytes_by_part(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, int]:
    """Bytes on disk, every key counted once, under the first part that claims it."""
    part_of: dict[str, str] = {}
    for layer in anatomy.layers:
        part_of.update(dict.fromkeys(anatomy.experts[layer.name], "experts"))
        part_of.update(dict.fromkeys(anatomy.axes[layer.name], "routers"))
    keys: dict[str, str] = {}
    modules = _module_parts(checkpoint.model)
    for name, layout in checkpoint.layout.items():
        own = part_of.get(name) or _part(name, modules)
        for key in layout.all_keys():
            keys.setdefault(key, own)
    mtp = set(anatomy.mtp_keys)
    for key in checkpoint.extra_keys:
        keys[key] = "prediction layers" if key in mtp else "other"
    parts = dict.fromkeys(PARTS, 0)
    for key, part in keys.items():
        parts[part] = parts.get(part, 0) + checkpoint.tensors[key].num_bytes
    return parts


def _module_parts(model: PreTrainedModel) -> dict[str, str]:
    """The part that a module and all below it belong to, told by its class or its name."""
    found = {}
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        kind, leaf = type(module).__name__.lower(), name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) or module is output:
            found[name] = "embeddings"
        elif "shared_expert" in leaf or "shared_mlp" in leaf:
            found[name] = "shared experts"
        elif any(word in kind for word in ("attention", "mamba", "deltanet")) and "." in name:
            found[name] = "attention"
    return found


def _part(name: str, modules: dict[str, str]) -> str:
    pieces = name.split(".")
    prefixes = (".".join(pieces[:i]) for i in range(1, len(pieces)))
    return next((modules[p] for p in prefixes if p in modules), "other")


def _facts(checkpoint: Checkpoint, anatomy: Anatomy) -> list[str]:
    """What one should know about this family's layers, as short phrases."""
    first = anatomy.layers[0]
    module: Any = checkpoint.model.get_submodule(first.experts)
    facts = [] if is_module_dict(module) else _expert_facts(module)
    facts += _factor_facts(checkpoint, anatomy)
    facts += _router_facts(first, anatomy)
    modules = checkpoint.model.get_submodule(first.name).named_modules()
    if any("shared_expert" in name or "shared_mlp" in name for name, _ in modules):
        facts.append("a shared expert, which every token passes and nothing here changes")
    if checkpoint.config.is_encoder_decoder:
        facts.append("encoder and decoder, calibrated and evaluated by span corruption")
    if anatomy.mtp_keys:
        facts.append(
            f"multi-token-prediction layers with experts ({len(anatomy.mtp_keys)} tensors), "
            "dropped when experts are"
        )
    return facts


def _expert_facts(module: Any) -> list[str]:
    facts = ["gated experts" if module.has_gate else "experts without a gate"]
    if module.has_bias:
        facts.append("experts with biases")
    return facts


def _factor_facts(checkpoint: Checkpoint, anatomy: Anatomy) -> list[str]:
    """How the experts are decomposed, where they are."""
    modules = [checkpoint.model.get_submodule(layer.experts) for layer in anatomy.layers]
    factored = [module for module in modules if is_factored(module)]
    if not factored:
        return []
    ranks, kept, whole = set(), 0, 0
    for module in factored:
        for name in matrices(module):
            u, v, rows = (module.get_parameter(f"{name}_{part}") for part in ("u", "v", "rows"))
            ranks.add(u.shape[2])
            kept += rows.numel()
            whole += u.shape[0] * u.shape[1] * v.shape[2]
    rank = f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
    where = f"{len(factored)} of {len(modules)} layers"
    share = f"{kept / whole:.1%} of the entries"
    return [f"decomposed experts in {where}: rank {rank}, and rows that hold {share}"]


def _router_facts(layer: MoeLayer, anatomy: Anatomy) -> list[str]:
    facts = []
    if layer.n_group > 1:
        facts.append(
            f"a group-limited router: the best {layer.topk_group} of {layer.n_group} groups"
        )
    if any(name.endswith("correction_bias") for name in anatomy.axes[layer.name]):
        facts.append("a selection bias")
    return facts


def _made(checkpoint: Checkpoint) -> Made | None:
    """What smelt/plan.json says, where there is one that can be read."""
    own = checkpoint.folder / "smelt"
    try:
        plan = json.loads((own / "plan.json").read_text(encoding="utf-8"))
        provenance = json.loads((own / "provenance.json").read_text(encoding="utf-8"))
        return Made(
            form=plan["form"],
            method=plan["recipe"]["method"],
            source=provenance["source"],
            experts_before=[layer["num_experts"] for layer in plan["layers"]],
            experts_after=[layer["num_groups"] for layer in plan["layers"]],
            bytes_before=plan["predicted"]["bytes_before"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
