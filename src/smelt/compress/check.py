"""What a plan refuses before anything is read, and what a recipe says about each layer."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from math import floor
from typing import get_args

from smelt.compress.align import BY_ACTIVATIONS
from smelt.compress.budget import SCORES, RouterGroups, check_count
from smelt.compress.check_stages import check_decompose, check_hidden_units, check_reconstruct
from smelt.compress.grouping import GROUPINGS
from smelt.compress.merge import MERGES
from smelt.compress.methods import Method, Operator, resolve
from smelt.compress.plan import LayerFacts
from smelt.compress.refit import REFITS
from smelt.compress.router import ROUTERS
from smelt.compress.rules import NEEDS_GRADIENTS, OWN_ORDER, RULES
from smelt.compress.similarity import find_similarity
from smelt.errors import PlanError
from smelt.plugins import find
from smelt.recipe import CompressRecipe
from smelt.routing import LayerStats

MERGE_ONLY = ("similarity", "grouping", "align", "reference", "weights", "rule", "repair")
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
    _check_rule(method)
    if recipe.method == "auto":
        _check_auto(facts, recipe)
    skipped = [name for name in MERGE_ONLY if getattr(recipe, name) is not None]
    if method.operator != "merge" and skipped:
        warnings.warn(
            f"method {recipe.method} drops experts and merges none: {', '.join(skipped)} skipped.",
            stacklevel=2,
        )
    if method.operator not in get_args(Operator):
        raise PlanError(f"operator {method.operator!r}: there are {', '.join(get_args(Operator))}.")
    if method.operator == "constant" and recipe.form != "mapped":
        raise PlanError(
            f"method {recipe.method} puts vectors in the place of experts, which the {recipe.form} "
            "form cannot hold. Set form: mapped."
        )
    if method.operator == "constant" and recipe.decompose is not None:
        raise PlanError(
            f"method {recipe.method} puts vectors in the place of experts, which decomposed "
            "experts cannot have beside them. Leave decompose out, or choose another method."
        )
    if recipe.strict and method.budget != "global":
        raise PlanError("strict is a rule of the global budget. Set budget: global, or no strict.")
    if recipe.form == "stock":
        _check_stock(facts, recipe, method, excluded)
    if recipe.size is not None and recipe.form != "stock":
        raise PlanError(
            f"size chooses experts and hidden units together, for the stock form, not {recipe.form}"
            ". Set form: stock, or keep and budget: measured."
        )
    if recipe.hidden_units is not None:
        check_hidden_units(facts, recipe)
    if recipe.decompose is not None:
        check_decompose(facts, recipe)
    if recipe.reconstruct is not None:
        check_reconstruct(recipe)
    for layer in facts:
        groups_wanted(layer, recipe)


def _check_auto(facts: Sequence[LayerFacts], recipe: CompressRecipe) -> None:
    """Candidates are judged after a fit, on tokens that are walked; each must be possible."""
    if recipe.reconstruct is None or recipe.reconstruct.inputs == "sample":
        raise PlanError(
            "method auto judges its candidates by fits on the calibration text: set reconstruct "
            "(--reconstruct), with inputs: walk."
        )
    own = [name for name in ("score", *MERGE_ONLY) if getattr(recipe, name) is not None]
    if own:
        raise PlanError(
            f"method auto takes every candidate as it is, so {', '.join(own)} cannot be set. Name "
            "a method, or functions of your own among auto.candidates."
        )
    for name in recipe.candidates:
        # Groups are decided on the stream that the fits are on, whatever a candidate does alone.
        one = recipe.model_copy(update={"method": name, "sequential": bool(recipe.sequential)})
        method = resolve(one)
        if method.operator == "constant" or needs_gradients(method):
            raise PlanError(
                f"auto.candidates: {name} needs what the others do not have (vectors in the place "
                "of experts, or gradients). Compress by it alone."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(facts, one)


def _check_names(method: Method) -> None:
    """Every coordinate names something that exists."""
    find(SCORES, method.score, "score")
    find(MERGES, method.weights, "weights")
    find(RULES, method.rule, "rule")
    find(GROUPINGS, method.grouping, "grouping")
    routers: dict[str, object] = {**ROUTERS, **REFITS}
    find(routers, method.router, "router")
    find_similarity(method.similarity)


def _check_stock(
    facts: Sequence[LayerFacts], recipe: CompressRecipe, method: Method, excluded: Collection[int]
) -> None:
    """An ordinary checkpoint of a family has one expert count, and its router must fit it."""
    advice = "Use form: mapped, where the counts of layers may differ."
    if method.budget != "uniform":
        raise PlanError(
            f"the stock form has as many experts in every layer, not a {method.budget} budget. "
            f"{advice}"
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


def _check_rule(method: Method) -> None:
    """The ways to make one expert of a group fit each other."""
    if method.operator != "merge":
        return
    if method.reference == "others" and method.align in BY_ACTIVATIONS:
        raise PlanError(
            "reference others is weight matching: the mean of several experts has no activations "
            "of its own. Set align: weights, or reference: dominant."
        )
    if method.rule in OWN_ORDER and (method.align != "none" or method.repair):
        raise PlanError(
            f"rule {method.rule} matches hidden units by itself, so no unit of the result is that "
            "of every member. Set align: none and repair: false."
        )
    if method.repair and method.align == "none":
        raise PlanError(
            "repair compares hidden units of the merged expert with those of its members, which "
            "only aligned members have in common. Set align: weights or activations."
        )
    if method.sequential and "gradient" in _parts(method.similarity):
        raise PlanError(
            "a sequential compression takes its groups from a walk of the compressed model, which "
            "has no backward pass: similarity gradient is for one-shot plans. Leave sequential out."
        )


def needs_gradients(method: Method) -> bool:
    """Whether planning or carrying the method out reads gradients."""
    if method.operator != "merge":
        return False
    return method.rule in NEEDS_GRADIENTS or "gradient" in _parts(method.similarity)


def _parts(similarity: str) -> list[str]:
    """The similarities that a product or a mean is made of."""
    return [part.strip() for part in similarity.replace("+", "*").split("*")]


def check_gradients(
    facts: Sequence[LayerFacts],
    stats: Mapping[str, LayerStats],
    excluded: Collection[int],
    method: Method,
) -> None:
    """There are gradients where the method reads them."""
    if not needs_gradients(method):
        return
    for position, layer in enumerate(facts):
        if position not in excluded and stats[layer.name].gradient_gram is None:
            what = (
                f"rule {method.rule}" if method.rule in NEEDS_GRADIENTS else "similarity gradient"
            )
            raise PlanError(
                f"{what} needs gradients, and the statistics hold none. Calibrate with "
                "`smelt calibrate --gradients`."
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
    if recipe.size is not None and recipe.experts is None:
        return float(E)  # chosen by measurement, once there are statistics
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
