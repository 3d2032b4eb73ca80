"""Budgets by measurement: how much of each layer's output is lost, on the stored input sample.

Errors are those of `layer_error`, before any repair. No model is run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, gcd

import numpy as np

from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.width import hidden_field
from smelt.compress.calibrate import Progress, RoutingStats
from smelt.compress.check import (
    groups_wanted,
    positions,
    protected_experts,
    router_groups_of,
)
from smelt.compress.check_stages import UNITS_MULTIPLE
from smelt.compress.facts import Facts
from smelt.compress.layer_error import layer_errors
from smelt.compress.plan import LayerFacts, Plan
from smelt.errors import CheckpointError, PlanError
from smelt.recipe import CompressRecipe

Planner = Callable[..., Plan]
"""`make_plan` of one checkpoint and its statistics: a recipe, and counts by layer or None."""

_CELLS = 1 << 17
"""Steps that a budget is divided into at most: one expert each, where all are of one size."""

_POINTS = 8
"""Counts at which a layer's error is measured; between them it is taken to be straight."""


@dataclass(frozen=True)
class Measurer:
    """Measures plans of one checkpoint."""

    checkpoint: Checkpoint
    facts: Facts
    stats: RoutingStats
    plan: Planner
    progress: Progress | None = None

    def errors(self, plan: Plan) -> dict[str, float]:
        return layer_errors(
            self.checkpoint, self.facts, plan, self.stats, workers=plan.recipe.workers
        )


def measured_counts(found: Measurer, recipe: CompressRecipe) -> list[int]:
    """How many experts each layer keeps: least total error under the bytes of a uniform budget.

    Errors of layers add up as shares of each layer's own output.
    """
    layers = found.facts.layers
    least, budget = bounds(layers, recipe)
    curves = _curves(found, recipe, least)
    counts = cheapest(curves, [layer.expert_bytes for layer in layers], least, budget)
    assert counts is not None, "the least experts fit"
    return counts


def bounds(layers: Sequence[LayerFacts], recipe: CompressRecipe) -> tuple[list[int], float]:
    """The least experts that each layer keeps, and the bytes that all may take together.

    Raises:
        PlanError: the least take more than that.
    """
    excluded = positions(layers, recipe.excluded, "excluded")
    protected = protected_experts(layers, recipe)
    least = [
        layer.num_experts
        if i in excluded
        else min(layer.num_experts, max(recipe.min_per_layer, len(protected[i]) + 1))
        for i, layer in enumerate(layers)
    ]
    budget = sum(
        layer.expert_bytes * (layer.num_experts if i in excluded else groups_wanted(layer, recipe))
        for i, layer in enumerate(layers)
    )
    smallest = sum(n * layer.expert_bytes for n, layer in zip(least, layers, strict=True))
    if smallest > budget + 0.5:
        raise PlanError(
            f"a budget of {budget:,.0f} bytes of experts cannot be met: with min_per_layer = "
            f"{recipe.min_per_layer}, excluded layers and protected experts they take {smallest:,} "
            "at least. Keep more, or lower min_per_layer."
        )
    return least, budget


def cheapest(
    curves: Sequence[np.ndarray], cost: Sequence[int], least: Sequence[int], budget: float
) -> list[int] | None:
    """The counts of least total error whose bytes fit the budget; None: the least do not fit.

    By dynamic programming over the bytes, layer by layer: exact, whatever the shape of the curves.
    Of equal errors, later layers keep more.

    Args:
        curves: by layer, the error when 0, 1, … E experts are kept.
        cost: bytes of one expert, by layer.
        least: that each layer keeps.
    """
    unit = max(gcd(*cost), ceil(budget / _CELLS))
    units = [ceil(one / unit) for one in cost]
    room = int(budget / unit + 1e-9)
    best = np.zeros(room + 1)  # of the layers so far, by the bytes that they may take
    choices = []
    for curve, step, low in zip(curves, units, least, strict=True):
        new = np.full(room + 1, np.inf)
        choice = np.zeros(room + 1, dtype=np.int32)
        for count in range(low, min(len(curve) - 1, room // step) + 1):
            total = np.full(room + 1, np.inf)
            total[count * step :] = best[: room + 1 - count * step] + curve[count]
            is_better = total < new
            new[is_better], choice[is_better] = total[is_better], count
        best = new
        choices.append(choice)
    if not np.isfinite(best[room]):
        return None
    counts: list[int] = []
    for choice, step in zip(reversed(choices), reversed(units), strict=True):
        counts.insert(0, int(choice[room]))
        room -= counts[0] * step
    return counts


def _curves(found: Measurer, recipe: CompressRecipe, least: Sequence[int]) -> list[np.ndarray]:
    """By layer, the error of its output when n of its experts are kept; never falls with fewer."""
    layers = found.facts.layers
    points: list[dict[int, float]] = [{layer.num_experts: 0.0} for layer in layers]
    for step in range(1, _POINTS + 1):
        counts = [
            max(low, round(layer.num_experts * (1 - step / _POINTS)))
            for layer, low in zip(layers, least, strict=True)
        ]
        errors = found.errors(found.plan(recipe, counts))
        for layer, count, known in zip(layers, counts, points, strict=True):
            known.setdefault(count, errors[layer.name])
        if found.progress:
            found.progress(f"{sum(counts) / len(counts):.0f} experts", step, _POINTS)
    curves = []
    for layer, known in zip(layers, points, strict=True):
        at = np.array(sorted(known))
        values = np.maximum.accumulate(np.array([known[n] for n in at])[::-1])[::-1]
        curves.append(np.interp(np.arange(layer.num_experts + 1), at, values))
    return curves


def measured_shape(found: Measurer, recipe: CompressRecipe) -> CompressRecipe:
    """The recipe with the experts and hidden units whose error is least, within `size`.

    Along the line of equal bytes: fewer experts of all their units, or more experts of fewer, up to
    eight places between. The mean over layers of relative output errors decides; ties go to more
    hidden units.

    Raises:
        PlanError: a size below the smallest legal plan.
    """
    possible = shapes(found.checkpoint, found.facts, recipe)
    tried: list[tuple[float, int, CompressRecipe]] = []
    for number, (experts, units) in enumerate(possible):
        chosen = recipe.model_copy(update={"experts": experts, "hidden_units": units})
        errors = list(found.errors(found.plan(chosen, None)).values())
        tried.append((sum(errors) / len(errors), number, chosen))
        if found.progress:
            found.progress(f"{experts} experts", number + 1, len(possible))
    return min(tried, key=lambda one: one[:2])[2]


def shapes(
    checkpoint: Checkpoint, facts: Facts, recipe: CompressRecipe
) -> list[tuple[int, int | None]]:
    """Experts and hidden units (None: all) within `size`, from few whole experts to many.

    Raises:
        PlanError: a size below the smallest legal plan.
    """
    assert recipe.size is not None
    layer = facts.layers[0]
    whole, E = layer.hidden_size, layer.num_experts
    room = recipe.size * E * whole
    can_shrink = _can_shrink(checkpoint, facts)
    found: list[tuple[int, int | None]] = []
    for experts in range(layer.top_k, E + 1):
        if not router_groups_of(layer).holds(experts, layer.top_k):
            continue
        units = int(room / experts / UNITS_MULTIPLE + 1e-9) * UNITS_MULTIPLE
        if units >= whole:
            found = [(experts, None)]  # of those that stay whole, the most
        elif can_shrink and units >= UNITS_MULTIPLE:
            found.append((experts, units))
    if not found:
        smallest = UNITS_MULTIPLE if can_shrink else whole
        raise PlanError(
            f"size = {recipe.size}: {layer.top_k} experts of {smallest} hidden units, the fewest "
            f"that this model's router and kernels take, are "
            f"{layer.top_k * smallest / (E * whole):.3f} of the experts' bytes. Allow more."
        )
    picked = np.linspace(0, len(found) - 1, min(_POINTS, len(found))).round().astype(int)
    return [found[i] for i in sorted(set(picked.tolist()))]


def _can_shrink(checkpoint: Checkpoint, facts: Facts) -> bool:
    """Whether the family's configuration sizes its experts, and nothing else."""
    sizes = {layer.hidden_size for layer in facts.layers}
    try:
        hidden_field(checkpoint, facts.anatomy.layers, min(sizes), UNITS_MULTIPLE)
    except CheckpointError:
        return False
    return len(sizes) == 1
