from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.samples import random_bank, random_stats
from smelt.compress.check import check
from smelt.compress.decide import layer_seed, make_plan, regroup
from smelt.compress.methods import METHODS_TABLE, resolve
from smelt.compress.plan import LayerFacts, Plan
from smelt.compress.similarity import Evidence
from smelt.errors import PlanError, RecipeError
from smelt.recipe import DEFAULT_METHODS, CompressRecipe
from smelt.routing import LayerStats
from smelt.settings import check_recipe

NAMES = ("model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp")
EXPERT, ROUTER, OTHER = 100, 6, 1000


def facts_of(**changes: Any) -> list[LayerFacts]:
    layer = LayerFacts(
        name="",
        block=0,
        num_experts=8,
        top_k=2,
        model_size=6,
        hidden_size=5,
        expert_params=EXPERT,
        expert_bytes=2 * EXPERT,
        num_router_params=ROUTER,
        router_bytes=2 * ROUTER,
    )
    return [replace(layer, name=n, block=i + 1, **changes) for i, n in enumerate(NAMES)]


def recipe_of(**settings: Any) -> CompressRecipe:
    if "keep" not in settings:
        settings.setdefault("experts", 4)
    settings.setdefault("method", "m-smoe")
    return check_recipe({"source": "in", "output": "out", **settings}, CompressRecipe)


def stats_of(seed: int = 0) -> dict[str, LayerStats]:
    torch.manual_seed(seed)
    return {name: random_stats() for name in NAMES}


def plan_of(facts: list[LayerFacts] | None = None, seed: int = 0, **settings: Any) -> Plan:
    return make_plan(
        facts or facts_of(),
        stats_of(seed),
        recipe_of(**settings),
        bank=lambda name: random_bank("gated", E=8),
        router_weight=lambda name: torch.ones(8, 6),
        other_params=OTHER,
        other_bytes=2 * OTHER,
        checkpoint_hash="abc",
    )


@pytest.mark.parametrize("method", METHODS_TABLE)
@pytest.mark.parametrize("similarity", ["router-logits", "random", "router-logits*expert-feature"])
def test_a_plan_is_a_function_of_its_inputs_and_survives_the_file(
    method: str, similarity: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method": method, "protect": {1: [3], NAMES[2]: [0]}}
    settings["form"] = "mapped" if METHODS_TABLE[method].operator == "constant" else "stock"
    if METHODS_TABLE[method].operator == "merge":
        settings["similarity"] = similarity
    plan = plan_of(**settings)
    assert plan == plan_of(**settings)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert plan.layers[1].protected == (3,)
    assert 3 in plan.layers[1].dominants
    assert plan.layers[1].labels.count(plan.layers[1].labels[3]) == 1


def test_the_file_has_one_line_per_field(tmp_path: Path) -> None:
    plan = plan_of(form="mapped")
    plan.save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    labels = ", ".join(map(str, plan.layers[0].labels))
    assert f'      "labels": [{labels}],' in lines


@pytest.mark.parametrize("average", [2.5, 4.0, 5.75])
def test_a_global_plan_spends_exactly_its_budget(average: float) -> None:
    plan = plan_of(form="mapped", keep=average / 8, excluded=[1])
    assert abs(sum(layer.num_groups for layer in plan.layers) - (2 * average + 8)) <= 0.5
    assert plan.layers[1].operator == "keep"
    assert len({layer.num_groups for layer in plan.layers}) > 1


def test_predicted_numbers_are_the_closed_formulas() -> None:
    stock = plan_of(experts=4).predicted
    assert stock.params_before == OTHER + 3 * 8 * (EXPERT + ROUTER)
    assert stock.params_after == OTHER + 3 * 4 * (EXPERT + ROUTER)
    assert stock.bytes_after == 2 * stock.params_after
    assert stock.moe_flops_per_token_before == 3 * 2 * (2 * EXPERT + 8 * ROUTER)
    assert stock.moe_flops_per_token_after == 3 * 2 * (2 * EXPERT + 4 * ROUTER)
    mapped = plan_of(experts=4, form="mapped", budget="uniform")
    assert mapped.predicted.params_after == OTHER + 3 * (4 * EXPERT + 8 * ROUTER)
    assert mapped.predicted.bytes_after == 2 * mapped.predicted.params_after + 3 * 8 * 8
    once = [
        sum(len({layer.labels[e] for e in token}) for token in stats.sample_choice.tolist()) / 200
        for layer, stats in zip(mapped.layers, stats_of().values(), strict=True)
    ]
    expected = 2 * (sum(once) * EXPERT + 3 * 8 * ROUTER)
    assert mapped.predicted.moe_flops_per_token_after == pytest.approx(expected, abs=1)
    expanded = plan_of(experts=4, form="expanded").predicted
    assert (expanded.params_after, expanded.bytes_after) == (
        stock.params_before,
        stock.bytes_before,
    )


def test_all_experts_kept_is_a_plan_that_changes_nothing() -> None:
    for method, row in METHODS_TABLE.items():
        if row.operator == "constant":  # no stock form
            continue
        plan = plan_of(keep=1.0, method=method)
        assert {layer.operator for layer in plan.layers} == {"keep"}
        assert plan.layers[0].labels == tuple(range(8))
        assert plan.predicted.bytes_after == plan.predicted.bytes_before


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "mapped", "protect": [5]},
        {"form": "mapped", "strict": True},
        {"method": "reap"},
        {"similarity": "random", "score": "saliency", "weights": "mean"},
    ],
)
def test_regrouping_on_the_same_statistics_changes_nothing(settings: dict[str, Any]) -> None:
    plan, stats = plan_of(**settings), stats_of()
    for position, layer in enumerate(plan.layers):
        evidence = Evidence(stats[layer.name], seed=layer_seed(0, position))
        assert regroup(layer, evidence, plan.recipe) == layer


def test_random_groups_differ_from_layer_to_layer_and_seed_to_seed() -> None:
    stats = dict.fromkeys(NAMES, random_stats())
    found = set()
    for seed in (0, 1):
        plan = make_plan(facts_of(), stats, recipe_of(similarity="random", seed=seed, experts=2))
        found |= {layer.labels for layer in plan.layers}
    assert len(found) == 6


def test_regrouping_decides_anew_within_the_same_budget() -> None:
    plan, other = plan_of(form="mapped"), stats_of(9)
    again = [regroup(la, Evidence(other[la.name]), plan.recipe) for la in plan.layers]
    assert [la.num_groups for la in again] == [la.num_groups for la in plan.layers]
    assert [la.labels for la in again] != [la.labels for la in plan.layers]
    fresh = make_plan(facts_of(), other, recipe_of(form="mapped", budget="uniform", experts=4))
    same = [la for la, one in zip(again, fresh.layers, strict=True) if la.num_groups == 4]
    assert all(la in fresh.layers for la in same)


def test_a_stock_plan_of_a_group_limited_router_keeps_its_groups() -> None:
    plan = plan_of(facts_of(n_group=2, topk_group=1), experts=4)
    for layer in plan.layers:
        assert [e // 4 for e in layer.dominants] == [0, 0, 1, 1]
        assert [g // 2 for g in layer.labels] == [0, 0, 0, 0, 1, 1, 1, 1]
        assert layer.router_groups == 2
    assert plan_of(facts_of(n_group=2, topk_group=1), experts=3, form="mapped").layers


@pytest.mark.parametrize(
    ("settings", "facts", "message"),
    [
        ({"budget": "global"}, {}, "not a global budget. Use form: mapped"),
        ({"excluded": [0]}, {}, "none can be excluded"),
        ({"experts": 1}, {}, "nearest count that works is 2"),
        ({"experts": 6}, {"n_group": 4, "topk_group": 2}, "nearest count that works is 8"),
        ({"experts": 9}, {}, "has 8. Keep 8 or fewer"),
        ({"keep": 0.01, "form": "mapped"}, {}, "leaves no expert of 8"),
        ({"reference": "others", "align": "activations"}, {}, "no activations of its own"),
        ({"rule": "zipit"}, {}, "matches hidden units by itself"),
        ({"method": "zipit", "repair": True}, {}, "matches hidden units by itself"),
        ({"repair": True, "align": "none"}, {}, "which only aligned members have in common"),
        ({"similarity": "gradient", "sequential": True}, {}, "gradient is for one-shot plans"),
        ({"strict": True}, {}, "strict is a rule of the global budget"),
        ({"form": "mapped", "excluded": [0, 1, 2]}, {}, "every MoE layer is excluded"),
        ({"form": "mapped", "excluded": [7]}, {}, "no MoE layer 7"),
        ({"form": "mapped", "excluded": ["mlp"]}, {}, "such as 'model.layers.1.mlp'"),
        ({"protect": [8]}, {}, r"experts 0 to 7, not \[8\]"),
        ({"protect": [0, 1, 2, 3, 4]}, {}, "do not fit in 4 per layer"),
        ({"protect": [0, 1, 2, 3]}, {}, "have no group to join"),
        ({"form": "mapped", "min_per_layer": 5}, {}, "min_per_layer = 5 needs 15"),
    ],
)
def test_a_compression_that_cannot_exist_is_refused(
    settings: dict[str, Any], facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(facts_of(**facts), **settings)


def test_layers_of_different_sizes_cannot_be_stock() -> None:
    facts = facts_of()
    facts[1] = replace(facts[1], num_experts=6)
    with pytest.raises(PlanError, match=r"keep \[3, 4\] experts"):
        check(facts, recipe_of(keep=0.5))
    check(facts, recipe_of(keep=0.5, form="mapped"))


def test_a_router_that_cannot_be_refitted_is_refused_when_planned() -> None:
    rows = torch.randn(8, 6)
    stats = dict.fromkeys(NAMES, random_stats(router=rows))
    refit = recipe_of(router="refit")
    assert make_plan(facts_of(), stats, refit, router_weight=lambda name: rows).layers
    for other in (torch.ones(8, 6), None):
        with pytest.raises(PlanError, match="reads what its experts read"):
            make_plan(facts_of(), stats, refit, router_weight=dict.fromkeys(NAMES, other).get)


def test_what_is_refused_is_refused_before_statistics_are_needed() -> None:
    with pytest.raises(PlanError, match="none can be excluded"):
        check(facts_of(), recipe_of(excluded=[0]))
    with pytest.raises(PlanError, match="no MoE layers"):
        check([], recipe_of())
    with pytest.raises(RecipeError, match="Did you mean 'saliency'"):
        check(facts_of(), recipe_of(score="salency"))


def test_statistics_of_another_checkpoint_are_refused() -> None:
    stats = stats_of()
    with pytest.raises(PlanError, match="belong to another checkpoint"):
        make_plan(facts_of(), {**stats, NAMES[1]: random_stats(E=6)}, recipe_of())
    del stats[NAMES[2]]
    with pytest.raises(PlanError, match="model.layers.3.mlp: the statistics do not know"):
        make_plan(facts_of(), stats, recipe_of())
    make_plan(facts_of(), stats, recipe_of(form="mapped", excluded=[2]))


def test_weights_are_read_only_where_the_similarity_asks() -> None:
    asked: list[str] = []

    def bank(name: str) -> Any:
        asked.append(name)
        return random_bank("gated", E=8)

    make_plan(facts_of(), stats_of(), recipe_of(), bank=bank)
    assert asked == []
    make_plan(facts_of(), stats_of(), recipe_of(similarity="expert-weight"), bank=bank)
    assert asked == list(NAMES)


def test_a_method_left_out_is_one_that_the_form_can_hold() -> None:
    for form, method in DEFAULT_METHODS.items():
        values = {"source": "in", "output": "out", "experts": 4, "form": form}
        recipe = check_recipe(values, CompressRecipe)
        assert recipe.method == method
        check(facts_of(), recipe)


def test_a_merge_setting_that_a_dropping_method_skips_is_said() -> None:
    with pytest.warns(UserWarning, match="align skipped"):
        plan_of(method="reap", align="none")


def test_a_recipe_overrides_coordinates_of_its_method() -> None:
    method = resolve(recipe_of(form="mapped", score="ean", align="none"))
    assert (method.score, method.align, method.budget) == ("ean", "none", "global")
    assert resolve(recipe_of()).budget == "uniform"  # the stock form decides


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 4, "keep": 0.5}, "one of experts .*, keep"),
        ({"keep": None}, "one of experts .*, keep"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"form": "gguf"}, "'stock', 'mapped' or 'expanded'"),
        ({"simlarity": "random"}, "no setting 'simlarity'"),
        ({"calibration": {"tokens": 5}}, "no setting 'calibration.tokens'.*num_tokens"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(**settings)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', "a plan of version 2"),
        ('"labels": [0', '"labels": [1', "do not fit together"),
        ('"num_groups": 4', '"num_groups": "4"', "valid integer"),
        ('"form": "stock",', '"form": "stock", "colour": "red",', "colour"),
        ("}", "", "cannot be read as a plan"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "plan.json"
    plan_of().save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)
    with pytest.raises(PlanError, match="no such plan"):
        Plan.load(tmp_path / "none.json")
