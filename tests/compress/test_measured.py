"""Laws of budgets by measurement."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.laws import Ground
from smelt.checkpoint.source import Checkpoint
from smelt.compress.layer_error import layer_errors
from smelt.compress.measured import cheapest
from smelt.errors import PlanError, RecipeError
from smelt.recipe import CompressRecipe
from smelt.settings import check_recipe


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground.make(
        tmp_path_factory.mktemp("source"), num_hidden_layers=3, moe_intermediate_size=48
    )


def total(counts, curves):
    return sum(curve[n] for n, curve in zip(counts, curves, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 3), st.integers(2, 5), st.data())
def test_the_counts_are_the_best_of_all_that_fit(layers, E, data):
    numbers = st.lists(st.floats(0, 1), min_size=E + 1, max_size=E + 1)
    curves = [np.array(data.draw(numbers)) for _ in range(layers)]
    cost = [data.draw(st.sampled_from([2, 3])) for _ in range(layers)]
    budget = data.draw(st.integers(sum(cost), E * sum(cost)))
    counts = cheapest(curves, cost, [1] * layers, budget)
    possible = [
        c
        for c in product(range(1, E + 1), repeat=layers)
        if sum(n * one for n, one in zip(c, cost, strict=True)) <= budget
    ]
    assert tuple(counts) in possible
    assert total(counts, curves) == pytest.approx(min(total(c, curves) for c in possible))


def test_a_budget_below_the_least_is_none():
    curve = np.linspace(1, 0, 9)
    assert cheapest([curve, curve], [10, 10], [2, 2], 39) is None
    assert cheapest([curve, curve], [10, 10], [2, 2], 40) == [2, 2]


def test_counts_add_up_and_lose_no_more_than_uniform_ones(ground, tmp_path):
    shared = {"form": "mapped", "method": "reap", "experts": 4}
    plans = {b: ground.plan(tmp_path, budget=b, **shared) for b in ("uniform", "measured")}
    counts = [layer.num_groups for layer in plans["measured"].layers]
    assert sum(counts) == 4 * 3
    assert plans["measured"].predicted.bytes_after == plans["uniform"].predicted.bytes_after
    lost = {
        b: sum(layer_errors(ground.checkpoint, ground.facts, p, ground.stats).values())
        for b, p in plans.items()
    }
    assert lost["measured"] <= lost["uniform"] + 1e-6


def test_excluded_and_protected_experts_stay_under_a_measured_budget(ground, tmp_path):
    plan = ground.plan(
        tmp_path,
        form="mapped",
        method="m-smoe",
        budget="measured",
        experts=4,
        excluded=(1,),
        protect=(2, 5),
    )
    counts = [layer.num_groups for layer in plan.layers]
    assert counts[1] == 8
    assert counts[0] + counts[2] == 8
    for layer in plan.layers:
        assert {2, 5} <= set(layer.dominants)


def test_size_keeps_within_the_bytes_and_is_the_best_of_its_line(ground, tmp_path):
    plan = ground.plan(tmp_path, form="stock", method="reap", experts=None, size=0.5)
    layer = plan.layers[0]
    units = layer.hidden_units or 48
    assert layer.num_groups * units <= 0.5 * 8 * 48
    assert (plan.recipe.experts, plan.recipe.hidden_units) == (layer.num_groups, layer.hidden_units)
    shapes = {4: None, 5: 32, 6: 32, 7: 16, 8: 16}
    lost = {}
    for experts, hidden_units in shapes.items():
        other = ground.plan(
            tmp_path, form="stock", method="reap", experts=experts, hidden_units=hidden_units
        )
        errors = layer_errors(ground.checkpoint, ground.facts, other, ground.stats)
        lost[experts] = sum(errors.values())
    assert layer.num_groups == min(lost, key=lost.get)
    out = ground.compress(tmp_path / "out", form="stock", method="reap", experts=None, size=0.5)
    assert Checkpoint.open(out).config.num_experts == layer.num_groups
    again = CompressRecipe.model_validate(plan.recipe.model_dump())
    assert again == plan.recipe


def test_a_family_whose_units_cannot_go_keeps_them(tmp_path):
    made = Ground.make(tmp_path / "source", "deepseek_v3")
    plan = made.plan(tmp_path / "out", form="stock", method="reap", experts=None, size=0.8)
    assert {layer.hidden_units for layer in plan.layers} == {None}
    assert plan.layers[0].num_groups == 6  # two groups of three


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0.01}, "Allow more"),
        ({"size": 0.5, "form": "mapped"}, "for the stock form"),
        ({"experts": 2, "min_per_layer": 4, "budget": "measured", "form": "mapped"}, "at least"),
        ({"experts": 4, "budget": "measured", "form": "stock"}, "not a measured budget"),
    ],
)
def test_what_cannot_be_is_refused(ground, tmp_path, given, message):
    settings = {"form": "stock", "method": "reap", "experts": None, **given}
    with pytest.raises(PlanError, match=message):
        ground.plan(tmp_path, **settings)


@pytest.mark.parametrize(
    "given",
    [{}, {"keep": 0.5, "size": 0.5}, {"size": 0.5, "hidden_units": 16}, {"keep": 1, "experts": 2}],
)
def test_there_is_one_budget(given):
    with pytest.raises(RecipeError, match="size"):
        check_recipe({"source": "a", "output": "b", "method": "reap", **given}, CompressRecipe)
