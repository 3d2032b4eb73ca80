"""What a plan makes of the whole checkpoint: parameters, bytes on disk, FLOPs per token."""

from collections.abc import Mapping, Sequence

import torch

from smelt.compress.plan import LayerFacts, LayerPlan, Predicted
from smelt.routing import LayerStats


def layer_bytes(layer: LayerFacts, form: str, num_groups: int) -> tuple[int, int]:
    """Bytes on disk of everything with an expert axis, before and after."""
    E, per_expert = layer.num_experts, layer.expert_bytes + layer.router_bytes
    after = {
        "stock": num_groups * per_expert,
        "mapped": num_groups * layer.expert_bytes + E * (layer.router_bytes + layer.map_bytes),
        "expanded": E * per_expert,
    }
    return E * per_expert, after[form]


def predict(
    facts: Sequence[LayerFacts],
    stats: Mapping[str, LayerStats],
    layers: Sequence[LayerPlan],
    form: str,
    other_params: int,
    other_bytes: int,
) -> Predicted:
    """Parameters, bytes and the MoE layers' FLOPs of the whole checkpoint."""
    before = after = flops_before = 0
    flops_after = 0.0
    for fact, layer in zip(facts, layers, strict=True):
        E, G = fact.num_experts, fact.num_experts if form == "expanded" else layer.num_groups
        rows = layer.num_groups if form == "stock" else E
        before += E * (fact.expert_params + fact.num_router_params)
        after += G * fact.expert_params + rows * fact.num_router_params
        used = _experts_run(fact, layer, stats.get(fact.name)) if form == "mapped" else fact.top_k
        flops_before += 2 * (fact.top_k * fact.expert_params + E * fact.num_router_params)
        flops_after += 2 * (used * fact.expert_params + rows * fact.num_router_params)
    return Predicted(
        params_before=other_params + before,
        params_after=other_params + after,
        bytes_before=other_bytes + sum(layer.bytes_before for layer in layers),
        bytes_after=other_bytes + sum(layer.bytes_after for layer in layers),
        moe_flops_per_token_before=flops_before,
        moe_flops_per_token_after=round(flops_after),
    )


def _experts_run(fact: LayerFacts, layer: LayerPlan, stats: LayerStats | None) -> float:
    """Distinct groups among a token's choices, on average over the input sample."""
    if stats is None or layer.operator == "keep":
        return fact.top_k
    group = torch.tensor(layer.labels)[stats.sample_choice.clamp(min=0)]
    is_hit = torch.zeros(len(group), layer.num_groups).scatter_(1, group, 1.0)
    return float(is_hit.sum(1).mean())
