"""Laws of choosing a method for each layer by trial."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.laws import Ground
from compress.test_walking import batches, compress, contents, fits
from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import calibrate
from smelt.compress.facts import read_facts
from smelt.compress.plan import Plan
from smelt.errors import PlanError, RecipeError
from smelt.recipe import AUTO_CANDIDATES, CompressRecipe
from smelt.settings import check_recipe

STEPS = 10
FITS = {"steps": STEPS, "batch_tokens": 64, "target": "layer"}
NAMES = ("reap", "frequency", "m-smoe", "hc-smoe")


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground.make(tmp_path_factory.mktemp("source"), num_hidden_layers=3)


def layers(folder):
    return Plan.load(folder / "smelt" / "plan.json").layers


@pytest.mark.parametrize("form", ["stock", "mapped"])
def test_what_was_tried_is_what_each_method_would_have_come_to(ground, tmp_path, form):
    auto = {"candidates": NAMES, "steps": STEPS, "protect": 0}
    shared = {"form": form, "budget": "uniform", "reconstruct": FITS}
    chosen = layers(compress(ground, tmp_path / "auto", method="auto", auto=auto, **shared))
    alone = {name: compress(ground, tmp_path / name, method=name, **shared) for name in NAMES}
    for number, layer in enumerate(chosen):
        errors = {name: layers(folder)[number].fit.after for name, folder in alone.items()}
        assert layer.tried == pytest.approx(errors, rel=1e-4)
        assert list(layer.tried.values()) == sorted(layer.tried.values())
        best = min(errors, key=errors.get)
        assert layer.fit.after == pytest.approx(errors[best], rel=1e-4)
        own = layers(alone[best])[number]
        assert (layer.operator, layer.labels, layer.weights) == (
            own.operator,
            own.labels,
            own.weights,
        )


def test_the_same_seed_gives_the_same_bytes(ground, tmp_path):
    settings = {"method": "auto", "form": "stock", "reconstruct": {**FITS, "target": "corrected"}}
    first = compress(ground, tmp_path / "a" / "out", **settings)
    again = compress(ground, tmp_path / "b" / "out", **settings)
    first, again = contents(first), contents(again)
    assert first.keys() == again.keys()
    assert all(first[k] == again[k] for k in first if not k.endswith("plan.json"))  # its output


def test_an_expert_whose_loss_no_fit_mends_is_protected(tmp_path):
    """The least used expert of a layer, made loud: frequency drops it, the trial brings it back."""
    plain = Ground.make(tmp_path / "plain")
    quiet = int(plain.stats.layers["model.layers.0.mlp"].count.argmin())
    model = AutoModelForCausalLM.from_pretrained(plain.folder)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[quiet] *= 100
    model.save_pretrained(tmp_path / "loud")
    checkpoint = Checkpoint.open(tmp_path / "loud")
    stats = calibrate(checkpoint, batches(4), text="t", sample_tokens=64)
    made = Ground(tmp_path / "loud", checkpoint, read_facts(checkpoint), stats)
    shared = {"form": "stock", "experts": 4, "reconstruct": FITS}
    dropped = compress(made, tmp_path / "frequency", method="frequency", **shared)
    assert quiet not in layers(dropped)[0].dominants
    auto = {"candidates": ["frequency"], "steps": STEPS, "protect": 1}
    out = compress(made, tmp_path / "auto", method="auto", auto=auto, **shared)
    first = layers(out)[0]
    assert first.protected == (quiet,)
    assert list(first.tried) == [f"frequency, {quiet} protected", "frequency"]
    assert fits(out)[first.name].after < 0.5 * fits(dropped)[first.name].after


def test_a_router_of_few_groups_has_no_room_for_what_it_would_protect(tmp_path):
    """Two runs of two experts each: where both are protected, a third one cannot be."""
    made = Ground.make(tmp_path / "source", "deepseek_v3")
    auto = {"candidates": ["reap"], "steps": STEPS, "protect": 6}
    settings = {"method": "auto", "auto": auto, "form": "stock", "experts": 4}
    out = compress(made, tmp_path / "out", reconstruct=FITS, protect=(0, 1), **settings)
    for layer in layers(out):
        assert {0, 1} <= set(layer.protected)
        assert not {2, 3} & set(layer.protected)


@pytest.mark.parametrize("form", AUTO_CANDIDATES)
def test_the_usual_candidates_are_possible_and_each_is_tried(ground, tmp_path, form):
    out = compress(ground, tmp_path / "out", method="auto", form=form, reconstruct=FITS)
    for layer in layers(out):
        assert set(AUTO_CANDIDATES[form]) <= set(layer.tried)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--reconstruct"),
        ({"reconstruct": {"inputs": "sample"}}, "inputs: walk"),
        ({"reconstruct": FITS, "similarity": "random"}, "cannot be set"),
        ({"reconstruct": FITS, "auto": {"candidates": ["fisher"]}}, "by it alone"),
        ({"reconstruct": FITS, "auto": {"candidates": ["mone"]}, "form": "mapped"}, "mapped|alone"),
    ],
)
def test_what_cannot_be_tried_is_refused(ground, tmp_path, settings, message):
    with pytest.raises(PlanError, match=message):
        ground.plan(tmp_path, **{"form": "stock", "method": "auto", **settings})


def test_a_candidate_that_does_not_exist_is_named(ground, tmp_path):
    with pytest.raises(RecipeError, match="reapp"):
        ground.plan(
            tmp_path, method="auto", form="stock", reconstruct=FITS, auto={"candidates": ["reapp"]}
        )
    values = {"source": "a", "output": "b", "keep": 0.5, "auto": {"candidates": ["auto"]}}
    with pytest.raises(RecipeError, match="none itself"):
        check_recipe(values, CompressRecipe)
