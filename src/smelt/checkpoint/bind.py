"""Experts modules as values: found by their own flags, read as an ExpertBank, written back.

transformers gives every experts module the same contract and flags that say how it differs
(gated, biased, transposed, interleaved). Switch keeps one module per expert, and smelt's own
factored form low-rank matrices; all are bound here, and nothing outside asks which it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig, PreTrainedModel

from smelt.checkpoint.factor_bank import read_factors
from smelt.checkpoint.factored import is_factored
from smelt.checkpoint.factored_forward import expert_output
from smelt.checkpoint.families import (
    COUNT_FIELDS,
    NOT_COVERED,
    SCORE_FIELDS,
    SIGMOID,
    TOP_K_FIELDS,
)
from smelt.checkpoint.skeleton import outermost_blocks
from smelt.errors import CheckpointError
from smelt.experts import ExpertBank


class NoExpertsError(CheckpointError):
    """A model that has no experts: dense, and nothing to merge."""


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a model: where it is and what its modules say of it."""

    name: str  # the module that holds router and experts
    experts: str  # the experts module
    block: str  # the repeated block it lies in
    num_experts: int  # E, what the router chooses from
    num_stored: int  # experts there are weights for: E, or fewer in a mapped checkpoint
    top_k: int
    n_group: int  # router groups of group-limited routing; 1: none
    topk_group: int
    min_per_group: int  # experts a router group must hold: 2 where it is scored by its best two
    router: str | None  # the module that scores the experts
    is_softmax: bool  # else sigmoid scores


def is_common(module: nn.Module) -> bool:
    """Whether a module follows transformers' experts contract; factored it still does."""
    return hasattr(module, "is_transposed") and (
        isinstance(getattr(module, "down_proj", None), nn.Parameter) or is_factored(module)
    )


def is_module_dict(module: nn.Module) -> bool:
    """Whether a module is called with one-hot ids, and keeps (or, factored, once kept) its
    experts as expert_0 … with an up and a down matrix (Switch).
    """
    if not isinstance(module, nn.ModuleDict) or "expert_0" not in module:
        return isinstance(module, nn.ModuleDict) and is_factored(module)
    return hasattr(module["expert_0"], "wi") and hasattr(module["expert_0"], "wo")


def find_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """The MoE layers of a model in the order of its modules.

    Raises:
        CheckpointError: there are none: not an MoE, or a family that is not covered.
    """
    kind = model.config.model_type
    if kind in NOT_COVERED:
        raise CheckpointError(
            f"Family {kind!r} is not covered: {NOT_COVERED[kind]}. docs/add-a-family.md says how a "
            "family is added."
        )
    blocks = outermost_blocks(model)
    layers = [
        _describe(model, path, module, blocks)
        for path, module in model.named_modules()
        if is_common(module) or is_module_dict(module)
    ]
    if not layers:
        counts = [getattr(model.config.get_text_config(), n, None) for n in COUNT_FIELDS]
        if any(isinstance(n, int) and n > 1 for n in counts):
            raise CheckpointError(
                f"Family {kind!r} has experts, but none that follow transformers' experts "
                "contract. docs/add-a-family.md says how such a family is added."
            )
        raise NoExpertsError(
            f"Family {kind!r}: this model has no experts, so there is nothing to merge. smelt "
            "compresses mixture-of-experts models."
        )
    return layers


def _describe(
    model: PreTrainedModel, path: str, module: nn.Module, blocks: Mapping[str, nn.Module]
) -> MoeLayer:
    parent = path.rpartition(".")[0]
    block = next((b for b in blocks if parent == b or parent.startswith(b + ".")), parent)
    stored = int(module.num_experts)  # type: ignore[arg-type]
    expert_map = getattr(module, "expert_map", None)
    num_experts = stored if expert_map is None else expert_map.shape[0]
    config = model.config.get_text_config()
    router = _find_router(model.get_submodule(parent), path.rpartition(".")[2], num_experts)
    scorer = model.get_submodule(f"{parent}.{router}") if router else None
    n_group, topk_group, min_per_group = _router_groups(scorer)
    return MoeLayer(
        name=parent,
        experts=path,
        block=block,
        num_experts=num_experts,
        num_stored=stored,
        top_k=1 if is_module_dict(module) else _top_k(config, scorer),
        n_group=n_group,
        topk_group=topk_group,
        min_per_group=min_per_group,
        router=f"{parent}.{router}" if router else None,
        is_softmax=not _is_sigmoid(config, scorer),
    )


def _router_groups(scorer: nn.Module | None) -> tuple[int, int, int]:
    """How many groups a router has, how many it opens, and how many experts each must hold.

    Read off the router, not the configuration: some families have the fields and do not limit.
    Only the DeepSeek-V2 routers name a method, and score a group by its best expert; all others
    score it by its best two.
    """
    method = getattr(scorer, "topk_method", None)
    n_group = getattr(scorer, "num_group", None) or getattr(scorer, "n_group", None)
    if not n_group or method == "greedy":
        return 1, 1, 1
    topk_group: int = getattr(scorer, "topk_group", None) or n_group
    return n_group, topk_group, 1 if method == "group_limited_greedy" else 2


def _top_k(config: PreTrainedConfig, scorer: nn.Module | None) -> int:
    own = getattr(scorer, "top_k", None)
    found = [own] + [getattr(config, name, None) for name in TOP_K_FIELDS]
    return next((k for k in found if isinstance(k, int) and k > 0), 1)


def _is_sigmoid(config: PreTrainedConfig, scorer: nn.Module | None) -> bool:
    named = next((v for n in SCORE_FIELDS if isinstance(v := getattr(config, n, None), str)), "")
    if named:
        return named != "softmax"
    return hasattr(scorer, "e_score_correction_bias") or config.model_type in SIGMOID


def _find_router(parent: nn.Module, experts: str, num_experts: int) -> str | None:
    """The child that scores the experts: `gate` or `router`, or one with a row per expert."""
    children = {n: c for n, c in parent.named_children() if n != experts and "shared" not in n}

    def has_rows(name: str, least: int, most: int) -> bool:
        return any(
            p.dim() == 2 and least <= p.shape[0] <= most for p in children[name].parameters()
        )

    # A router may score a few things more than the experts: shared ones, or doing nothing.
    named = [n for n in ("gate", "router") if n in children and has_rows(n, num_experts, 1 << 30)]
    return next(iter(named + [n for n in children if has_rows(n, num_experts, num_experts)]), None)


def activation_of(module: nn.Module) -> Callable[[Tensor | None, Tensor], Tensor]:
    """The module's own activation as `(gate, up) -> hidden`."""
    if is_module_dict(module):
        act: Any = (module if is_factored(module) else module.get_submodule("expert_0")).act
        return lambda gate, up: act(up)
    if not module.has_gate:
        return lambda gate, up: module.act_fn(up)  # type: ignore[operator]

    def apply(gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        parts = [gate, up]
        joined = (
            torch.cat(parts, -1) if module.is_concatenated else torch.stack(parts, -1).flatten(-2)
        )
        return module._apply_gate(joined)  # type: ignore[operator]

    return apply


def read_bank(module: nn.Module, path: str, read: Callable[[str], Tensor]) -> ExpertBank:
    """The experts of a module as a bank in [out, in] orientation; views of what `read` gives.

    Factored ones are multiplied out.
    """
    activation = activation_of(module)
    if is_factored(module):
        return read_factors(module, path, read, activation).dense()
    if is_module_dict(module):
        count: int = module.num_experts  # type: ignore[assignment]
        ups = torch.stack([read(f"{path}.expert_{i}.wi.weight") for i in range(count)])
        downs = torch.stack([read(f"{path}.expert_{i}.wo.weight") for i in range(count)])
        return ExpertBank(up=ups, down=downs, activation=activation)

    def oriented(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if module.is_transposed else tensor

    down = oriented(read(f"{path}.down_proj"))
    down_bias = read(f"{path}.down_proj_bias") if module.has_bias else None
    if not module.has_gate:
        up_bias = read(f"{path}.up_proj_bias") if module.has_bias else None
        up = oriented(read(f"{path}.up_proj"))
        return ExpertBank(
            up=up, down=down, up_bias=up_bias, down_bias=down_bias, activation=activation
        )
    gate, up = _split(module, oriented(read(f"{path}.gate_up_proj")))
    biases = read(f"{path}.gate_up_proj_bias") if module.has_bias else None
    gate_bias, up_bias = (None, None) if biases is None else _split(module, biases)
    return ExpertBank(up, down, gate, up_bias, gate_bias, down_bias, activation)


def _split(module: nn.Module, joined: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up out of one tensor whose axis 1 holds both."""
    if module.is_concatenated:
        half = joined.shape[1] // 2
        return joined[:, :half], joined[:, half:]
    return joined[:, 0::2], joined[:, 1::2]


def write_bank(module: nn.Module, path: str, bank: ExpertBank) -> dict[str, Tensor]:
    """The inverse of `read_bank`: the module's parameters by name, contiguous."""
    if is_module_dict(module):
        ups = {f"{path}.expert_{i}.wi.weight": t for i, t in enumerate(bank.up)}
        return ups | {f"{path}.expert_{i}.wo.weight": t for i, t in enumerate(bank.down)}

    def oriented(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous() if module.is_transposed else tensor.contiguous()

    named: dict[str, Tensor | None] = {
        "down_proj": oriented(bank.down),
        "down_proj_bias": bank.down_bias,
    }
    if bank.gate is None:
        named |= {"up_proj": oriented(bank.up), "up_proj_bias": bank.up_bias}
    else:
        named["gate_up_proj"] = oriented(_join(module, bank.gate, bank.up))
        if bank.gate_bias is not None and bank.up_bias is not None:
            named["gate_up_proj_bias"] = _join(module, bank.gate_bias, bank.up_bias)
    return {f"{path}.{name}": tensor for name, tensor in named.items() if tensor is not None}


def _join(module: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    if module.is_concatenated:
        return torch.cat([gate, up], 1)
    return torch.stack([gate, up], 2).flatten(1, 2)


def input_width(module: nn.Module) -> int:
    """D of what the experts read."""
    if is_factored(module):
        return int(module.get_parameter("up_v").shape[2])
    if is_module_dict(module):
        return int(module.get_submodule("expert_0.wi").in_features)  # type: ignore[arg-type]
    down: Tensor = module.down_proj  # type: ignore[assignment]
    return int(down.shape[2] if module.is_transposed else down.shape[1])


def expert_function(module: nn.Module) -> Callable[[int, Tensor], Tensor]:
    """f(e, x): what expert e of a module with weights makes of tokens x, before routing weights."""
    m: Any = module
    stored = m.expert_map.tolist() if hasattr(m, "expert_map") else range(m.num_experts)

    def beyond(e: int, x: Tensor) -> Tensor:
        """What a slot without an expert gives: nothing, or its constant."""
        row = stored[e] - m.num_experts - 1
        return torch.zeros_like(x) if row < 0 else m.constants[row].expand_as(x).to(x.dtype)

    if is_factored(module):
        return lambda e, x: (
            expert_output(module, stored[e], x) if stored[e] < m.num_experts else beyond(e, x)
        )
    if is_module_dict(module):
        return lambda e, x: (
            m[f"expert_{stored[e]}"](x) if stored[e] < m.num_experts else beyond(e, x)
        )

    def project(x: Tensor, weight: Tensor, bias: Tensor | None, e: int) -> Tensor:
        matrix = weight[e].T if m.is_transposed else weight[e]
        return linear(x, matrix, None if bias is None else bias[e])

    def run(expert: int, x: Tensor) -> Tensor:
        e = stored[expert]
        if e >= m.num_experts:
            return beyond(expert, x)
        if m.has_gate:
            bias = m.gate_up_proj_bias if m.has_bias else None
            h = m._apply_gate(project(x, m.gate_up_proj, bias, e))
        else:
            h = m.act_fn(project(x, m.up_proj, m.up_proj_bias if m.has_bias else None, e))
        y = project(h, m.down_proj, m.down_proj_bias if m.has_bias else None, e)
        return m.post_expert_norm(y) if m.has_post_expert_norm else y

    return run
