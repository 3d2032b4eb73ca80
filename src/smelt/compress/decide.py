"""From statistics and a recipe to a plan: every choice that compression makes, none of its work."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from smelt.compress.budget import SCORES, RouterGroups, dominants_global, dominants_uniform
from smelt.compress.check import (
    check,
    check_gradients,
    check_statistics,
    groups_wanted,
    positions,
    protected_experts,
    router_groups_of,
    uniform_count,
)
from smelt.compress.group import drop_others
from smelt.compress.grouping import GROUPINGS, Candidates
from smelt.compress.merge import MERGES
from smelt.compress.methods import Method, resolve
from smelt.compress.plan import LayerFacts, LayerPlan, Plan
from smelt.compress.predict import layer_bytes, predict, reshaped
from smelt.compress.refit import REFITS, check_readable
from smelt.compress.similarity import Evidence, find_similarity
from smelt.errors import PlanError
from smelt.experts import ExpertBank
from smelt.plugins import find
from smelt.recipe import CompressRecipe
from smelt.routing import LayerStats


def make_plan(
    facts: Sequence[LayerFacts],
    stats: Mapping[str, LayerStats],
    recipe: CompressRecipe,
    *,
    bank: Callable[[str], ExpertBank] | None = None,
    router_weight: Callable[[str], Tensor | None] | None = None,
    other_params: int = 0,
    other_bytes: int = 0,
    checkpoint_hash: str = "",
    statistics_hash: str = "",
    text_hash: str = "",
    counts: Sequence[int] | None = None,
) -> Plan:
    """The plan of a whole checkpoint.

    Args:
        facts: the MoE layers in model order.
        stats: by layer name; of excluded layers none are needed.
        bank: reads a layer's experts; called only where the similarity asks for weights.
        router_weight: a layer's router rows [E, D], or None where it has none.
        other_params: of everything that is neither an expert nor has an expert axis.
        counts: experts that each layer keeps, in place of the budget (`measured`).
    """
    check(facts, recipe)
    method = resolve(recipe)
    excluded = positions(facts, recipe.excluded, "excluded")
    protected = protected_experts(facts, recipe)
    check_statistics(facts, stats, excluded)
    check_gradients(facts, stats, excluded, method)
    dominants = _dominants(facts, stats, recipe, method, excluded, protected, counts)
    layers = []
    for position, (layer, kept) in enumerate(zip(facts, dominants, strict=True)):
        if len(kept) == layer.num_experts:
            layers.append(_kept_plan(layer, recipe.form, method))
            continue
        evidence = Evidence(
            stats[layer.name],
            None if bank is None else partial(bank, layer.name),
            None if router_weight is None else router_weight(layer.name),
            layer_seed(recipe.seed, position),
        )
        if method.router in REFITS and recipe.form == "stock" and router_weight is not None:
            check_readable(evidence.router_weight, evidence.stats)
        layers.append(
            _decided_plan(layer, recipe.form, method, kept, protected[position], evidence)
        )
    layers = [
        reshaped(layer, fact, recipe, is_excluded=position in excluded)
        for position, (layer, fact) in enumerate(zip(layers, facts, strict=True))
    ]
    return Plan(
        checkpoint=checkpoint_hash,
        statistics=statistics_hash,
        text=text_hash,
        form=recipe.form,
        method=method,
        predicted=predict(facts, stats, layers, recipe, other_params, other_bytes),
        recipe=recipe,
        layers=tuple(layers),
    )


def regroup(layer: LayerPlan, evidence: Evidence, recipe: CompressRecipe) -> LayerPlan:
    """The same layer decided anew from new statistics: as many groups, other dominants and members.

    Sequential compression calls it when the walk reaches a layer, whose inputs then come from the
    compressed layers before it. `evidence.seed` is `layer_seed(recipe.seed, position)`.
    """
    if layer.operator == "keep":
        return layer
    method = resolve(recipe)
    if evidence.stats.num_experts != layer.num_experts:
        raise PlanError(
            f"{layer.name}: the statistics are of {evidence.stats.num_experts} experts."
        )
    kept = dominants_uniform(
        find(SCORES, method.score, "score")(evidence.stats),
        layer.num_groups,
        protected=layer.protected,
        router=RouterGroups(n_group=layer.router_groups),
    )
    decision = _decision(kept, evidence, method, layer.protected, layer.router_groups)
    return LayerPlan.model_validate(layer.model_dump() | decision)


def candidate(
    layer: LayerPlan,
    fact: LayerFacts,
    evidence: Evidence,
    recipe: CompressRecipe,
    name: str,
    protected: Collection[int] = (),
) -> LayerPlan:
    """The layer as another method would have it, with as many experts."""
    method = resolve(recipe.model_copy(update={"method": name}))
    protected = sorted({*layer.protected, *protected})
    kept = dominants_uniform(
        find(SCORES, method.score, "score")(evidence.stats),
        layer.num_groups,
        protected=protected,
        router=router_groups_of(fact) if recipe.form == "stock" else RouterGroups(),
    )
    made = _decided_plan(fact, recipe.form, method, kept, protected, evidence)
    return reshaped(made, fact, recipe, is_excluded=False)


def layer_seed(seed: int, position: int) -> int:
    """The seed of one layer: random groups differ from layer to layer."""
    return seed * 1_000_003 + position


def _decision(
    kept: Tensor,
    evidence: Evidence,
    method: Method,
    protected: Collection[int],
    router_groups: int,
) -> dict[str, Any]:
    """The fields of a LayerPlan that statistics decide."""
    score = find(SCORES, method.score, "score")(evidence.stats)
    if method.operator != "merge":
        labels = drop_others(kept, len(score))
        likeness = (labels >= 0).double()
    else:
        similarity = cache(partial(find_similarity(method.similarity), evidence))
        candidates = Candidates(
            kept, score, similarity, evidence.stats.mean_output, protected, router_groups
        )
        labels, kept = find(GROUPINGS, method.grouping, "grouping")(candidates)
        likeness = similarity()[torch.arange(len(labels)), kept[labels]]
    weights = find(MERGES, method.weights, "weights")(labels, score)
    return {
        "dominants": tuple(kept.tolist()),
        "labels": tuple(labels.tolist()),
        # Rounded, so that the file holds the very numbers and stays short.
        "weights": tuple(float(f"{w:.9g}") for w in weights.tolist()),
        "similarity": tuple(round(s, 6) for s in likeness.tolist()),
    }


def _decided_plan(
    layer: LayerFacts,
    form: str,
    method: Method,
    kept: Tensor,
    protected: Collection[int],
    evidence: Evidence,
) -> LayerPlan:
    """The plan of a layer that loses experts."""
    router_groups = layer.n_group if form == "stock" else 1
    before, after = layer_bytes(layer, form, len(kept))
    merges = method.operator == "merge"
    if method.operator == "constant":
        after += (layer.num_experts - len(kept)) * layer.model_size * layer.bytes_per_param
    return LayerPlan(
        name=layer.name,
        operator=method.operator,
        num_experts=layer.num_experts,
        num_groups=len(kept),
        protected=tuple(sorted(protected)),
        router_groups=router_groups,
        align=method.align if merges else "none",
        reference=method.reference,
        rule=method.rule if merges else "sum",
        repair=method.repair and merges,
        router=method.router if form == "stock" else "all",
        bytes_before=before,
        bytes_after=after,
        **_decision(kept, evidence, method, protected, router_groups),
    )


def _kept_plan(layer: LayerFacts, form: str, method: Method) -> LayerPlan:
    """The plan of a layer that keeps every expert, bit for bit."""
    before, after = layer_bytes(layer, form, layer.num_experts)
    everyone = tuple(range(layer.num_experts))
    ones = (1.0,) * layer.num_experts
    return LayerPlan(
        name=layer.name,
        operator="keep",
        num_experts=layer.num_experts,
        num_groups=layer.num_experts,
        dominants=everyone,
        labels=everyone,
        weights=ones,
        similarity=ones,
        align="none",
        reference=method.reference,
        router="all",
        bytes_before=before,
        bytes_after=after,
    )


def _dominants(
    facts: Sequence[LayerFacts],
    stats: Mapping[str, LayerStats],
    recipe: CompressRecipe,
    method: Method,
    excluded: Collection[int],
    protected: Mapping[int, Collection[int]],
    counts: Sequence[int] | None,
) -> list[Tensor]:
    """The experts that stay in each layer."""
    score = find(SCORES, method.score, "score")
    scores = [
        torch.zeros(layer.num_experts) if position in excluded else score(stats[layer.name])
        for position, layer in enumerate(facts)
    ]
    if method.budget == "global" and counts is None:
        merged = [layer for position, layer in enumerate(facts) if position not in excluded]
        average = sum(groups_wanted(layer, recipe) for layer in merged) / len(merged)
        return dominants_global(
            scores,
            average,
            excluded=excluded,
            min_per_layer=recipe.min_per_layer,
            strict=recipe.strict,
            protected=protected,
        )
    return [
        torch.arange(layer.num_experts)
        if position in excluded
        else dominants_uniform(
            scores[position],
            uniform_count(layer, recipe) if counts is None else counts[position],
            protected=protected[position],
            router=router_groups_of(layer) if recipe.form == "stock" else RouterGroups(),
        )
        for position, layer in enumerate(facts)
    ]
