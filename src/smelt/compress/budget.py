"""How many experts each layer keeps, and which: the dominant experts (METHODS, section 2.2)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smelt.errors import PlanError
from smelt.routing import LayerStats

Score = Callable[[LayerStats], Float[Tensor, " E"]]

SCORES: dict[str, Score] = {
    "count": lambda stats: stats.count.double(),
    "gate-sum": lambda stats: stats.gate_sum,
    "saliency": lambda stats: stats.saliency,
    "mean-saliency": lambda stats: stats.mean_saliency,
    "ean": lambda stats: stats.output_norm,
    "usage-variance": lambda stats: stats.usage * stats.output_var,
}
"""How much an expert matters, from a layer's statistics: never negative, any scale."""


def share(score: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
    """The score as a share of its layer; all zero where the layer's score is.

    Its scale does not matter, so layers and statistics of any size can be compared.
    """
    score = score.double()
    if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
        raise PlanError(
            "a score must be finite and not negative, and this layer's is not. The statistics are "
            "damaged, or the score function is wrong: calibrate again."
        )
    total = score.sum()
    return score / total if total > 0 else score


@dataclass(frozen=True)
class RouterGroups:
    """The rule of a group-limited router: the best `topk_group` of `n_group` runs of experts."""

    n_group: int = 1
    topk_group: int = 1
    min_size: int = 1  # experts a group needs for its own score (DeepSeek-V3: 2)

    def holds(self, groups: int, top_k: int) -> bool:
        """Whether such a router can choose `top_k` of `groups` experts."""
        size, rest = divmod(groups, self.n_group)
        return rest == 0 and size >= self.min_size and self.topk_group * size >= top_k

    def nearest(self, groups: int, top_k: int, num_experts: int) -> int:
        """The count nearest to `groups` that the router can hold; of two, the larger."""
        fits = [n for n in range(1, num_experts + 1) if self.holds(n, top_k)]
        return min(fits, key=lambda n: (abs(n - groups), -n))


UNLIMITED = RouterGroups()


def check_count(
    groups: int, num_experts: int, top_k: int, router: RouterGroups = UNLIMITED
) -> None:
    """Refuse a number of experts that a stock router cannot choose `top_k` of."""
    if router.holds(groups, top_k):
        return
    near = router.nearest(groups, top_k, num_experts)
    rule = f"it chooses {top_k} per token"
    if router.n_group > 1:
        rule += (
            f" from the best {router.topk_group} of {router.n_group} equal groups of experts, "
            f"each of at least {max(router.min_size, ceil(top_k / router.topk_group))}"
        )
    raise PlanError(
        f"{groups} experts per layer do not fit this model's router: {rule}. "
        f"The nearest count that works is {near}; the mapped form takes any count."
    )


def dominants_uniform(
    score: Float[Tensor, " E"],
    groups: int,
    *,
    protected: Collection[int] = (),
    router: RouterGroups = UNLIMITED,
) -> Int[Tensor, " G"]:
    """The `groups` experts of one layer that stay, ascending: protected first, then by score.

    Ties go to the lower id. A group-limited router keeps groups/n_group inside each of its groups,
    so that the kept experts, in order, form the same groups again.
    """
    value = share(score).clone()
    if protected:
        value[list(protected)] = torch.inf
    size = len(value) // router.n_group
    kept = [
        start + best
        for start in range(0, len(value), size)
        for best in _top(value[start : start + size], groups // router.n_group).tolist()
    ]
    if lost := sorted(set(protected) - set(kept)):
        raise PlanError(
            f"protected experts {lost} do not fit in {groups} per layer. "
            "Keep more experts, or protect fewer."
        )
    return torch.tensor(kept, dtype=torch.int64)


def dominants_global(
    scores: Sequence[Float[Tensor, " _"]],
    average: float,
    *,
    excluded: Collection[int] = (),
    min_per_layer: int = 2,
    strict: bool = False,
    protected: Mapping[int, Collection[int]] | None = None,
) -> list[Int[Tensor, " _"]]:
    """The experts that stay in every layer, ascending, under one budget for the whole model.

    Args:
        scores: one per layer, in model order; layers may differ in E.
        average: g, the experts kept per merged layer on average; need not be whole.
        excluded: layers (positions) that keep all of their experts.
        min_per_layer: no merged layer keeps fewer (or all of its experts, if it has fewer).
        strict: take only entries strictly above the first one that no longer fits, without the
            floor: the sum may then be below the budget.
        protected: by layer, experts that stay and that nobody joins; they count in the budget. The
            best of the others stays with them, so that the rest of the layer has a group.

    Source: M-SMoE, arXiv:2310.01334, section 3.1 ("global" budget); `strict` is the authors' code.
    """
    protected = protected or {}
    raised = [
        torch.ones(len(score), dtype=torch.float64)
        if layer in excluded
        else _raised(share(score), protected.get(layer, ()))
        for layer, score in enumerate(scores)
    ]
    sizes = [len(value) for value in raised]
    num_excluded = sum(sizes[layer] for layer in excluded)
    budget = floor(average * (len(sizes) - len(excluded)) + num_excluded + 0.5)
    if not sum(map(_num_ones, raised)) <= budget <= sum(sizes):
        raise PlanError(
            f"a budget of {budget} experts for {len(sizes)} layers cannot be: excluded layers, "
            f"protected experts and the best expert of each layer are "
            f"{sum(map(_num_ones, raised))}, and the model has {sum(sizes)}."
        )
    counts = _strict_counts(raised, budget) if strict else _counts(raised, budget, min_per_layer)
    return [_top(value, count) for value, count in zip(raised, counts, strict=True)]


def _raised(value: Float[Tensor, " E"], protected: Collection[int]) -> Float[Tensor, " E"]:
    """Ã: the shares, with 1 for protected experts and for the largest of the others."""
    raised = value.clone()
    if protected:
        raised[list(protected)] = 1.0
    free = [e for e in range(len(value)) if e not in protected]
    if free:
        raised[max(free, key=lambda e: (float(value[e]), -e))] = 1.0
    return raised


def _num_ones(value: Tensor) -> int:
    return int((value >= 1).sum())


def _top(value: Float[Tensor, " E"], count: int) -> Int[Tensor, " G"]:
    """The ids of the `count` largest entries, ascending; ties go to the lower id."""
    order = np.argsort(-value.numpy(), kind="stable")[:count]
    return torch.from_numpy(np.sort(order))


def _ranking(raised: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """All values of all layers in descending order, and the layer of each.

    The sort is stable over (layer, id), so equal values rank by layer, then by id.
    """
    values = torch.cat(list(raised))
    order = torch.from_numpy(np.argsort(-values.numpy(), kind="stable"))
    layer = torch.repeat_interleave(torch.tensor([len(value) for value in raised]))
    return values[order], layer[order].tolist()


def _counts(raised: Sequence[Tensor], budget: int, min_per_layer: int) -> list[int]:
    """n_l: the first `budget` entries, then the floor, paid for by the lowest entries above it."""
    floors = [max(_num_ones(value), min(min_per_layer, len(value))) for value in raised]
    if sum(floors) > budget:
        raise PlanError(
            f"min_per_layer = {min_per_layer} needs {sum(floors)} experts in {len(raised)} layers "
            "(excluded layers and protected experts counted), and the budget is "
            f"{budget}. Lower min_per_layer or keep more experts."
        )
    _, layers = _ranking(raised)
    counts = [0] * len(raised)
    for layer in layers[:budget]:
        counts[layer] += 1
    owed = sum(max(0, low - n) for low, n in zip(floors, counts, strict=True))
    for layer in reversed(layers[:budget]):  # the lowest entry first, and a layer's lowest first
        if owed and counts[layer] > floors[layer]:
            counts[layer] -= 1
            owed -= 1
    return [max(low, n) for low, n in zip(floors, counts, strict=True)]


def _strict_counts(raised: Sequence[Tensor], budget: int) -> list[int]:
    """n_l: the entries strictly above the first one that no longer fits."""
    values, _ = _ranking(raised)
    if budget == len(values):
        return [len(value) for value in raised]
    counts = [int((value > values[budget]).sum()) for value in raised]
    if 0 in counts:
        raise PlanError(
            "strict: no entry of some layer is above the threshold, so it would keep no expert. "
            "Keep more experts, or leave strict off."
        )
    return counts
