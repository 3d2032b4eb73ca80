"""One ground done for real, in this process: fine-tuned, merged by every rule, healed, measured."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

from benchmarks import write_tasks
from healing_material import original
from smelt.checkpoint.source import Checkpoint
from smelt.comparison.cells import Cell
from smelt.comparison.measure import f1_parts
from smelt.comparison.rows import BUDGET, OTHER, SAME, gather, groups
from smelt.comparison.schedule import Progress
from smelt.comparison.settings import FULL, ComparisonRecipe
from smelt.comparison.tables import results
from smelt.comparison.work import do, outcomes_file
from smelt.comparison.works import Works
from smelt.compress.calibrate import RoutingStats
from smelt.compress.pipeline import run_plan
from smelt.settings import check_recipe
from smelt.study.store import read
from smelt.text2text.items import Answer, Item
from smelt.text2text.metrics import f1_of

RULES = ("average", "redirect", "zipit", "repair", "git-rebasin", "fisher", "regmean", "prune")


def recipe(folder, start):
    values = {
        "kind": "comparison",
        "output": str(folder / "compared"),
        "start": str(start),
        "fine_tune": {"steps": 3, "batch_size": 8, "warmup_steps": 1, "dtype": "float32"},
        "tasks": {"mrpc": {"batch_size": 9}},
        "calibration": {"task": {"limit": 24}, "sample_tokens": 64},
        "compress": {"experts": 3, "excluded": [0], "method": "m-smoe"},
        "heal": {"steps": 3, "batch_size": 8, "warmup_steps": 1},
        "variants": {
            "m-smoe": {},
            "mc-smoe": {
                "heal": {"decompose": {"rank": 4, "initial": 0.0, "final": 0.4}},
                "rate": "m-smoe",
            },
            "twice": {"after": "m-smoe", "rate": "m-smoe"},
        }
        | {name: {"compress": {"method": name}, "heal": None} for name in RULES},
        "heal_search": {"rates": [0.001, 0.01], "heal": {"steps": 2}, "extensions": 0},
        "parts": {
            "main": {"variants": ["m-smoe", "mc-smoe", "twice"], "tasks": ["mrpc"], "seeds": [0]},
            "rules": {"variants": list(RULES), "tasks": ["mrpc"], "seeds": [0]},
        },
        "focus": "m-smoe",
        "resamples": 100,
        "keep": "all",
    }
    return check_recipe(values, ComparisonRecipe)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Everything but the trials, done."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("SMELT_DATA", str(write_tasks(folder / "tasks")))
        made = recipe(folder, original(folder, "switch_transformers"))
        works = Works(made, Progress(made).store)
        do(works.full(Cell("mrpc", 0, FULL)))
        for name in ("m-smoe", "mc-smoe", "twice", "average"):
            do(works.variant(Cell("mrpc", 0, name), 0.01))
        do(works.trial("mrpc", "m-smoe", 0.01)[1])
    return made


def result(study, name):
    return read(Works(study, Progress(study).store).result(f"mrpc/seed-0/{name}"))


def test_all_rules_merge_the_same_groups_under_one_budget(study):
    works = Works(study, Progress(study).store)
    full = works.full(Cell("mrpc", 0, FULL))
    checkpoint, stats = Checkpoint.open(full.model), RoutingStats.load(full.stats)
    plans = {
        name: run_plan(checkpoint, stats, works.variant(Cell("mrpc", 0, name)).compress)
        for name in ("m-smoe", *RULES)
    }
    for name, plan in plans.items():
        for layer, other in zip(plan.layers, plans["m-smoe"].layers, strict=True):
            assert layer.dominants == other.dominants, name
            kept = {e: group for e, group in enumerate(layer.labels) if group >= 0}
            assert kept == {e: other.labels[e] for e in kept}
            assert name == "prune" or len(kept) == layer.num_experts


def test_other_groups_and_other_budgets_are_told_apart(study):
    progress, parts = Progress(study), study.parts.values()
    rows = {row.variant: row for part in parts for row in gather(progress, part, "mrpc")}
    moe = rows["m-smoe"]
    assert {groups(rows[name], moe) for name in ("average", "mc-smoe", "twice")} == {SAME}
    assert groups(rows[FULL], moe) is None
    assert [table["other_groups"] for table in results(study)["tables"]] == [[], []]
    plan = rows["average"].found[0]["plan"]
    layer = next(layer for layer in plan.values() if layer["operator"] == "merge")
    member = next(e for e in range(8) if e not in layer["dominants"])
    layer["labels"][member] = (layer["labels"][member] + 1) % 3
    assert groups(rows["average"], moe) == BUDGET
    layer["dominants"].append(member)
    assert groups(rows["average"], moe) == OTHER


def test_every_result_holds_what_a_table_needs(study):
    full, merged, healed = (result(study, name) for name in (FULL, "m-smoe", "mc-smoe"))
    assert list(full["metrics"]) == ["accuracy", "F1"] and full["items"].startswith("mrpc/test")
    assert full["metrics"]["accuracy"]["without_a_model"]["majority of training"] > 0
    assert [one["costs"]["experts"] for one in (full, merged, healed)] == [16, 11, 11]
    sizes = [one["costs"]["bytes"] for one in (full, merged, healed)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert merged["costs"]["parameters"] == merged["predicted"]["params_after"]
    assert all(
        one["costs"]["nonzero_parameters"] <= one["costs"]["parameters"] for one in (full, merged)
    )
    assert healed["costs"]["moe_flops_per_token"] < merged["costs"]["moe_flops_per_token"]
    assert merged["learning_rate"] == 0.01 and merged["healing"]["steps"] == 3
    assert "healing" not in result(study, "average") and "plan" not in full


def test_what_is_healed_twice_begins_where_the_first_healing_ended(study):
    first, second = result(study, "m-smoe"), result(study, "twice")
    (before,), (after,) = second["healing"]["before"].values(), first["healing"]["after"].values()
    assert before == pytest.approx(after)
    assert second["healing"]["earlier"]["steps"] == 3


def test_the_excluded_layer_stays_whole(study):
    config = json.loads(
        (Progress(study).store.run("mrpc/seed-0/mc-smoe") / "config.json").read_text()
    )
    assert list(config["factored_experts"]) == ["decoder.block.1.layer.2.mlp.experts"]


def test_every_result_names_the_full_model_it_is_of(study):
    folder = Works(study, Progress(study).store).folder(Cell("mrpc", 0, FULL))
    own = Checkpoint.open(folder).fingerprint
    assert {result(study, name)["full"] for name in ("full", "m-smoe", "twice", "average")} == {own}


def test_values_by_item_average_to_every_metric(study):
    works = Works(study, Progress(study).store)
    for name in (FULL, "m-smoe"):
        path = works.result(f"mrpc/seed-0/{name}")
        values, metrics = read(outcomes_file(path))["values"], read(path)["metrics"]
        for metric, one in metrics.items():
            assert np.mean(list(values[metric].values())) == pytest.approx(one["value"]), metric
            assert len(values[metric]) == one["n"]


def test_a_trial_is_measured_where_rates_are_chosen_and_leaves_no_weights(study):
    works = Works(study, Progress(study).store)
    name, work = works.trial("mrpc", "m-smoe", 0.01)
    found = read(works.result(name))
    assert found["loss"] == -found["value"] and found["metric"] == "accuracy"
    assert "metrics" not in found and not Path(work.model).exists()


def test_what_is_done_is_not_done_again(study, monkeypatch):
    monkeypatch.delenv("SMELT_DATA", raising=False)  # nothing can be read
    works = Works(study, Progress(study).store)
    before = works.result("mrpc/seed-0/m-smoe").read_bytes()
    do(works.variant(Cell("mrpc", 0, "m-smoe"), 0.01))
    assert works.result("mrpc/seed-0/m-smoe").read_bytes() == before


def test_f1_by_unit_averages_to_f1_and_spreads_as_resampling_does():
    random.seed(0)
    items = [
        Item(str(i), "", "", "", choices=("no", "yes"), label=int(random.random() < 0.4))
        for i in range(400)
    ]
    answers = [
        Answer((0.0, 1.0 if random.random() < (0.8 if item.label else 0.3) else -1.0))
        for item in items
    ]
    both = sum(a.choice and i.label for a, i in zip(answers, items, strict=True))
    value = f1_of(both, sum(a.choice for a in answers), sum(i.label for i in items))
    parts = np.array(list(f1_parts(items, answers, [i.name for i in items], value).values()))
    assert parts.mean() == pytest.approx(value)
    draw, found = np.random.default_rng(0), []
    for _ in range(500):
        chosen = draw.integers(400, size=400)
        own = [(answers[i].choice, items[i].label) for i in chosen]
        found.append(
            f1_of(sum(a and b for a, b in own), sum(a for a, _ in own), sum(b for _, b in own))
        )
    assert parts.std() / 20 == pytest.approx(np.std(found), rel=0.1)
