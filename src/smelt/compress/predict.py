"""What a plan makes of the whole checkpoint: parameters, bytes on disk, FLOPs per token."""

from collections.abc import Mapping, Sequence
from math import ceil, floor

import torch

from smelt.compress.check import positions
from smelt.compress.plan import LayerFacts, LayerPlan, MatrixFactors, Plan, Predicted
from smelt.recipe import CompressRecipe
from smelt.routing import LayerStats


def layer_bytes(layer: LayerFacts, form: str, num_groups: int) -> tuple[int, int]:
    """Bytes on disk of everything with an expert axis, before and after, experts as they are."""
    E, per_expert = layer.num_experts, layer.expert_bytes + layer.router_bytes
    after = {
        "stock": num_groups * per_expert,
        "mapped": num_groups * layer.expert_bytes + E * (layer.router_bytes + layer.map_bytes),
        "expanded": E * per_expert,
    }
    return E * per_expert, after[form]


def reshaped(
    layer: LayerPlan, fact: LayerFacts, recipe: CompressRecipe, *, is_excluded: bool
) -> LayerPlan:
    """The layer with the smaller experts that a recipe asks for: fewer hidden units, or factors.

    Factors of a fixed rank get it here. Ranks that the spectrum decides are found when the plan is
    carried out (`factoring`): a share of the bytes counts as used up, an energy as all of it.
    """
    if recipe.hidden_units is not None:
        layer = layer.model_copy(update={"hidden_units": recipe.hidden_units})
    elif recipe.decompose is not None and not is_excluded and recipe.decompose.size is not None:
        saved = (1 - recipe.decompose.size) * layer.num_groups * fact.expert_bytes
        return layer.model_copy(update={"bytes_after": layer.bytes_after - floor(saved)})
    elif recipe.decompose is not None and not is_excluded and recipe.decompose.fixed_rank:
        rank = recipe.decompose.fixed_rank
        factors = {
            name: MatrixFactors(rank=min(rank, *shape)) for name, shape in fact.matrices.items()
        }
        layer = layer.model_copy(update={"factors": factors})
    else:
        return layer
    return sized(layer, fact, recipe)


def sized(layer: LayerPlan, fact: LayerFacts, recipe: CompressRecipe) -> LayerPlan:
    """The layer with `bytes_after` by its hidden units or factors; the most, if rows are open."""
    whole = layer_bytes(fact, recipe.form, layer.num_groups)[1]
    params, num_rows = stored_params(layer, fact, recipe)
    less = layer.num_groups * fact.expert_params - params
    after = whole - less * fact.bytes_per_param + ROW_ID_BYTES * num_rows
    return layer.model_copy(update={"bytes_after": after})


ROW_ID_BYTES = 4
"""Of the number of one kept row of S."""


def stored_params(layer: LayerPlan, fact: LayerFacts, recipe: CompressRecipe) -> tuple[int, int]:
    """Parameters of all experts that a layer stores, and rows of S among them.

    While the rows of S are not decided: their share of the entries, and as many rows as that
    could be at most.
    """
    G, D = layer.num_groups, fact.model_size
    if layer.hidden_units is not None:
        F, left = fact.hidden_size, layer.hidden_units
        matrices = (2 + fact.has_gate) * D * left
        biases = (fact.bias_params - D) // F * left + D if fact.bias_params else 0
        return G * (matrices + biases), 0
    if layer.factors is None:
        return G * fact.expert_params, 0
    assert recipe.decompose is not None
    params, num_rows = G * fact.bias_params, 0
    for name, factors in layer.factors.items():
        out, width = fact.matrices[name]
        rows = sum(factors.rows) if factors.rows else 0
        if factors.rows is None:
            rows = ceil(recipe.decompose.keep * G * out)
        params += G * factors.rank * (out + width) + rows * width
        num_rows += rows
    return params, num_rows


def predict(
    facts: Sequence[LayerFacts],
    stats: Mapping[str, LayerStats],
    layers: Sequence[LayerPlan],
    recipe: CompressRecipe,
    other_params: int,
    other_bytes: int,
) -> Predicted:
    """Parameters, bytes and the MoE layers' FLOPs of the whole checkpoint."""
    form = recipe.form
    before = after = flops_before = 0
    flops_after = 0.0
    for fact, layer in zip(facts, layers, strict=True):
        E, G = fact.num_experts, fact.num_experts if form == "expanded" else layer.num_groups
        rows = layer.num_groups if form == "stock" else E
        stored, _ = stored_params(layer, fact, recipe)
        one = stored / layer.num_groups
        before += E * (fact.expert_params + fact.num_router_params)
        after += round(G * one) + rows * fact.num_router_params
        after += layer.num_constants * fact.model_size
        used = _experts_run(fact, layer, stats.get(fact.name)) if form == "mapped" else fact.top_k
        flops_before += 2 * (fact.top_k * fact.expert_params + E * fact.num_router_params)
        flops_after += 2 * (used * one + rows * fact.num_router_params)
    most = other_bytes + sum(layer.bytes_after for layer in layers)
    slack = _open_bytes(facts, layers, recipe)
    return Predicted(
        params_before=other_params + before,
        params_after=other_params + after,
        bytes_before=other_bytes + sum(layer.bytes_before for layer in layers),
        bytes_after=most + slack,
        bytes_after_least=most - slack
        if slack
        else _least_by_spectrum(facts, layers, recipe, most),
        moe_flops_per_token_before=flops_before,
        moe_flops_per_token_after=round(flops_after),
    )


def _least_by_spectrum(
    facts: Sequence[LayerFacts], layers: Sequence[LayerPlan], recipe: CompressRecipe, most: int
) -> int | None:
    """The bytes without the experts whose ranks the spectrum will decide; None: there are none."""
    if recipe.decompose is None or recipe.decompose.fixed_rank or any(x.factors for x in layers):
        return None
    excluded = positions(facts, recipe.excluded, "excluded")
    pairs = zip(facts, layers, strict=True)
    open_bytes = sum(
        layer.bytes_after - fact.num_experts * (fact.router_bytes + fact.map_bytes)
        for i, (fact, layer) in enumerate(pairs)
        if i not in excluded
    )
    return most - open_bytes


def predicted_again(
    plan: Plan,
    facts: Sequence[LayerFacts],
    stats: Mapping[str, LayerStats],
    layers: Sequence[LayerPlan],
) -> Plan:
    """The plan with these layers, and what it then makes of the whole checkpoint."""
    before = plan.predicted
    params = sum(f.num_experts * (f.expert_params + f.num_router_params) for f in facts)
    num_bytes = sum(layer.bytes_before for layer in layers)
    new = predict(
        facts,
        stats,
        layers,
        plan.recipe,
        before.params_before - params,
        before.bytes_before - num_bytes,
    )
    return plan.model_copy(update={"layers": tuple(layers), "predicted": new})


def _open_bytes(
    facts: Sequence[LayerFacts], layers: Sequence[LayerPlan], recipe: CompressRecipe
) -> int:
    """How far the bytes may lie from the middle while the rows of S are not decided.

    One threshold keeps a share of all entries to within one row. What is open is whose rows they
    are: long rows have fewer numbers beside them than short ones.
    """
    ids = entry = widest = 0
    for fact, layer in zip(facts, layers, strict=True):
        for name, factors in (layer.factors or {}).items():
            if factors.rows is not None:
                continue
            assert recipe.decompose is not None
            out, width = fact.matrices[name]
            D, F = fact.model_size, fact.hidden_size
            entries = recipe.decompose.keep * layer.num_groups * out * width
            ids += ceil(ROW_ID_BYTES * entries * (1 / min(D, F) - 1 / max(D, F)))
            entry, widest = max(entry, fact.bytes_per_param), max(widest, D, F)
            ids += ROW_ID_BYTES + width * fact.bytes_per_param  # rounded up, for each matrix
    return ids + 2 * (widest * entry + ROW_ID_BYTES) if widest else 0


def _experts_run(fact: LayerFacts, layer: LayerPlan, stats: LayerStats | None) -> float:
    """Distinct groups among a token's choices, on average over the input sample."""
    if stats is None or layer.operator == "keep":
        return fact.top_k
    group = stats.sample_groups(torch.tensor(layer.labels))
    # A choice that nothing serves runs nothing: it lands in one column more, which is cut off.
    group = group.masked_fill(group < 0, layer.num_groups)
    is_hit = torch.zeros(len(group), layer.num_groups + 1).scatter_(1, group, 1.0)
    return float(is_hit[:, :-1].sum(1).mean())
