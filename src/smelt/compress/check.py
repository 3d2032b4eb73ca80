"""What a plan refuses before anything is read, and what a recipe says about each layer."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from math import floor

from smelt.compress.budget import SCORES, RouterGroups, check_count
from smelt.compress.merge import MERGES
from smelt.compress.methods import Method, resolve
from smelt.compress.plan import LayerFacts
from smelt.compress.refit import REFITS
from smelt.compress.router import ROUTERS
from smelt.compress.similarity import find_similarity
from smelt.errors import PlanError
from smelt.plugins import find
from smelt.recipe import CompressRecipe
from smelt.routing import LayerStats

MERGE_ONLY = ("similarity", "align", "reference", "weights")
"""Coordinates that say nothing to a method that drops experts."""


def check(facts: Sequence[LayerFacts], recipe: CompressRecipe) -> None:
    """Refuse a compression that cannot exist. Needs no statistics and no weights: call it first."""
    method = resolve(recipe)
    _check_names(method)
    if not facts:
        raise PlanError("the checkpoint has no MoE layers: there is nothing to compress.")
    excluded = positions(facts, recipe.excluded, "excluded")
    protected_experts(facts, recipe)
    if len(excluded) == len(facts):
        raise PlanError("every MoE layer is excluded: there is nothing to compress.")
    if method.operator == "drop" and recipe.form != "stock":
        raise PlanError(
            f"method {recipe.method} drops experts, so its router loses their rows: only the stock "
            f"form can hold that, not {recipe.form}. Set form: stock, or merge (m-smoe)."
        )
    skipped = [name for name in MERGE_ONLY if getattr(recipe, name) is not None]
    if method.operator == "drop" and skipped:
        warnings.warn(
            f"method {recipe.method} drops experts and merges none: {', '.join(skipped)} skipped.",
            stacklevel=2,
        )
    if recipe.strict and method.budget != "global":
        raise PlanError("strict is a rule of the global budget. Set budget: global, or no strict.")
    if recipe.form == "stock":
        _check_stock(facts, recipe, method, excluded)
    for layer in facts:
        groups_wanted(layer, recipe)


def _check_names(method: Method) -> None:
    """Every coordinate names something that exists."""
    find(SCORES, method.score, "score")
    find(MERGES, method.weights, "weights")
    routers: dict[str, object] = {**ROUTERS, **REFITS}
    find(routers, method.router, "router")
    find_similarity(method.similarity)


def _check_stock(
    facts: Sequence[LayerFacts], recipe: CompressRecipe, method: Method, excluded: Collection[int]
) -> None:
    """An ordinary checkpoint of a family has one expert count, and its router must fit it."""
    advice = "Use form: mapped, where the counts of layers may differ."
    if method.budget == "global":
        raise PlanError(
            f"the stock form has as many experts in every layer, not a global budget. {advice}"
        )
    if excluded:
        raise PlanError(
            "the stock form has as many experts in every layer, so none can be excluded. " + advice
        )
    counts = {uniform_count(layer, recipe) for layer in facts}
    if len(counts) > 1:
        raise PlanError(
            f"the layers would keep {sorted(counts)} experts, and the stock form has as many in "
            f"every layer. Set experts, or: {advice}"
        )
    for layer in facts:
        check_count(
            uniform_count(layer, recipe), layer.num_experts, layer.top_k, router_groups_of(layer)
        )


def check_statistics(
    facts: Sequence[LayerFacts], stats: Mapping[str, LayerStats], excluded: Collection[int]
) -> None:
    """There are statistics of every layer that is decided, and they are of as many experts."""
    for position, layer in enumerate(facts):
        if position in excluded:
            continue
        if layer.name not in stats:
            raise PlanError(
                f"{layer.name}: the statistics do not know this layer. Calibrate again."
            )
        if stats[layer.name].num_experts != layer.num_experts:
            raise PlanError(
                f"{layer.name}: the statistics are of {stats[layer.name].num_experts} experts, the "
                f"checkpoint has {layer.num_experts}. They belong to another checkpoint."
            )


def groups_wanted(layer: LayerFacts, recipe: CompressRecipe) -> float:
    """g of a layer: the experts it keeps on average; need not be whole under a global budget."""
    E = layer.num_experts
    if recipe.experts is not None and recipe.experts > E:
        raise PlanError(f"experts = {recipe.experts}: {layer.name} has {E}. Keep {E} or fewer.")
    wanted = E * recipe.keep if recipe.keep is not None else float(recipe.experts or 0)
    if wanted < 0.5:
        raise PlanError(f"keep = {recipe.keep} leaves no expert of {E}. Keep at least {1 / E:.3g}.")
    return wanted


def uniform_count(layer: LayerFacts, recipe: CompressRecipe) -> int:
    """G of a layer under a uniform budget: g to the nearest whole number, halves up."""
    return floor(groups_wanted(layer, recipe) + 0.5)


def positions(facts: Sequence[LayerFacts], wanted: Collection[int | str], setting: str) -> set[int]:
    """The positions of layers given by name or by position (a number, or its digits)."""
    by_name = {layer.name: position for position, layer in enumerate(facts)}
    found = set()
    for key in wanted:
        position = by_name.get(key) if isinstance(key, str) else key
        if position is None and str(key).isdigit():
            position = int(key)
        if position is None or not 0 <= position < len(facts):
            raise PlanError(
                f"{setting}: there is no MoE layer {key!r}. Use a position from 0 to "
                f"{len(facts) - 1}, or a name such as {facts[0].name!r}."
            )
        found.add(position)
    return found


def protected_experts(
    facts: Sequence[LayerFacts], recipe: CompressRecipe
) -> dict[int, frozenset[int]]:
    """Protected expert ids of every layer, by position."""
    protect = recipe.protect
    if isinstance(protect, tuple):
        protect = {str(position): protect for position in range(len(facts))}
    found = dict.fromkeys(range(len(facts)), frozenset[int]())
    for key, ids in protect.items():
        (position,) = positions(facts, [key], "protect")
        E = facts[position].num_experts
        if wrong := [e for e in ids if not 0 <= e < E]:
            raise PlanError(
                f"protect: {facts[position].name} has experts 0 to {E - 1}, not {wrong}."
            )
        found[position] = frozenset(ids)
    return found


def router_groups_of(layer: LayerFacts) -> RouterGroups:
    """The rule of a layer's router about groups of experts."""
    return RouterGroups(layer.n_group, layer.topk_group, layer.min_per_router_group)
