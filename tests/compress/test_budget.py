import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from reference.compression import global_counts
from reference.samples import random_stats
from smelt.compress.budget import (
    SCORES,
    RouterGroups,
    check_count,
    dominants_global,
    dominants_uniform,
    share,
)
from smelt.errors import PlanError

counts = st.integers(0, 50)
models = st.integers(2, 9).flatmap(
    lambda E: st.lists(st.lists(counts, min_size=E, max_size=E), min_size=2, max_size=6)
)


def tensors(layers: list[list[int]]) -> list[torch.Tensor]:
    return [torch.tensor(layer, dtype=torch.float64) for layer in layers]


@settings(deadline=None)
@given(models, st.data())
def test_the_layers_share_exactly_the_budget(layers: list[list[int]], data: st.DataObject) -> None:
    L, E = len(layers), len(layers[0])
    excluded = set(data.draw(st.lists(st.integers(0, L - 1), max_size=L - 1)))
    floor = data.draw(st.integers(1, E))
    average = data.draw(st.integers(floor * 4, E * 4)) / 4
    kept = dominants_global(tensors(layers), average, excluded=excluded, min_per_layer=floor)
    total = average * (L - len(excluded)) + E * len(excluded)
    assert abs(sum(map(len, kept)) - total) <= 0.5
    assert all(len(ids) >= floor for ids in kept)
    assert all(len(kept[layer]) == E for layer in excluded)
    shares = [share(torch.tensor(layer).double()).tolist() for layer in layers]
    assert [len(ids) for ids in kept] == global_counts(shares, average, excluded, floor)


@settings(deadline=None)
@given(models, st.integers(1, 1000))
def test_the_scale_of_the_counts_does_not_matter(layers: list[list[int]], scale: int) -> None:
    scaled = [[scale * n for n in layer] for layer in layers]
    for one, other in zip(
        dominants_global(tensors(layers), 1.5, min_per_layer=1),
        dominants_global(tensors(scaled), 1.5, min_per_layer=1),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_layer_of_more_tokens_does_not_win_by_that() -> None:
    # The rare layer's second expert has the larger share, whatever its count.
    rare, busy = torch.tensor([6, 4, 0, 0.0]), torch.tensor([700, 200, 60, 40.0])
    kept = dominants_global([rare, busy], 1.5, min_per_layer=1)
    assert [ids.tolist() for ids in kept] == [[0, 1], [0]]


def test_the_floor_is_paid_by_the_lowest_entries_elsewhere() -> None:
    flat, peaked = torch.tensor([30, 25, 25, 20.0]), torch.tensor([97, 1, 1, 1.0])
    free = dominants_global([flat, peaked], 2.5, min_per_layer=1)
    assert [ids.tolist() for ids in free] == [[0, 1, 2, 3], [0]]
    floored = dominants_global([flat, peaked], 2.5, min_per_layer=2)
    assert [ids.tolist() for ids in floored] == [[0, 1, 2], [0, 1]]


def test_of_two_layers_that_could_pay_the_one_with_the_lowest_entry_does() -> None:
    flat, sloped = torch.tensor([25, 25, 25, 25.0]), torch.tensor([40, 30, 20, 10.0])
    peaked = torch.tensor([97, 1, 1, 1.0])
    kept = dominants_global([flat, sloped, peaked], 8 / 3, min_per_layer=2)
    assert [len(ids) for ids in kept] == [4, 2, 2]


def test_a_floor_that_cannot_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="min_per_layer = 3 needs 6 experts.*budget is 5"):
        dominants_global([torch.ones(4), torch.ones(4)], 2.5, min_per_layer=3)


def test_strict_takes_only_what_is_above_the_first_that_no_longer_fits() -> None:
    layers = [torch.tensor([50, 20, 20, 10.0]), torch.tensor([40, 30, 20, 10.0])]
    kept = dominants_global(layers, 2.0, strict=True)  # the 5th value is 0.2, of three experts
    assert [ids.tolist() for ids in kept] == [[0], [0, 1]]
    assert sum(map(len, dominants_global(layers, 2.0, min_per_layer=1))) == 4


@settings(deadline=None)
@given(models, st.integers(4, 32))
def test_strict_never_exceeds_the_budget(layers: list[list[int]], quarters: int) -> None:
    L, E = len(layers), len(layers[0])
    assume(4 < quarters <= 4 * E)
    kept = dominants_global(tensors(layers), quarters / 4, strict=True)
    assert sum(map(len, kept)) <= quarters / 4 * L + 0.5
    assert all(len(ids) for ids in kept)


def test_protected_experts_stay_and_count_and_the_best_other_stays_with_them() -> None:
    layers = [torch.tensor([5, 1, 90, 4.0]), torch.tensor([40, 30, 20, 10.0])]
    kept = dominants_global(layers, 2.5, min_per_layer=1, protected={0: [1]})
    assert [ids.tolist() for ids in kept] == [[1, 2], [0, 1, 2]]
    assert dominants_uniform(layers[0], 2, protected=[1, 3]).tolist() == [1, 3]
    with pytest.raises(PlanError, match=r"protected experts \[3\] do not fit in 2"):
        dominants_uniform(layers[0], 2, protected=[0, 1, 3])


def test_a_uniform_budget_keeps_the_best_and_breaks_ties_by_lower_id() -> None:
    assert dominants_uniform(torch.tensor([3, 7, 7, 1, 7.0]), 2).tolist() == [1, 2]
    assert dominants_uniform(torch.zeros(5), 3).tolist() == [0, 1, 2]


def test_a_group_limited_router_keeps_as_many_in_each_of_its_groups() -> None:
    score = torch.tensor([9, 8, 7, 6, 1, 2, 4, 3.0])
    kept = dominants_uniform(score, 4, router=RouterGroups(n_group=2, topk_group=1))
    assert kept.tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize(
    ("groups", "router", "top_k", "nearest"),
    [
        (3, RouterGroups(), 4, 4),  # fewer than top-k
        (6, RouterGroups(4, 2), 2, 8),  # not divisible: 4 and 8 are as near, the larger is named
        (4, RouterGroups(4, 2, min_size=2), 2, 8),  # DeepSeek-V3 scores a group by its best two
        (8, RouterGroups(4, 2), 6, 12),  # the best two groups hold only 4
    ],
)
def test_a_count_the_router_cannot_hold_is_refused_with_the_nearest_that_it_can(
    groups: int, router: RouterGroups, top_k: int, nearest: int
) -> None:
    with pytest.raises(PlanError, match=rf"nearest count that works is {nearest};"):
        check_count(groups, 16, top_k, router)
    check_count(nearest, 16, top_k, router)


def test_scores_are_what_they_are_called() -> None:
    stats = random_stats()
    assert torch.equal(SCORES["count"](stats), stats.count.double())
    assert torch.equal(SCORES["mean-saliency"](stats) * stats.count, SCORES["saliency"](stats))
    assert (SCORES["ean"](stats) >= SCORES["saliency"](stats)).all()
    for score in SCORES.values():
        torch.testing.assert_close(float(share(score(stats)).sum()), 1.0)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_score_that_is_no_amount_is_refused(bad: float) -> None:
    with pytest.raises(PlanError, match="finite and not negative"):
        share(torch.tensor([1.0, bad]))
