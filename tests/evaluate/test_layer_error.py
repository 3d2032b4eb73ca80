"""The error of a plan, found without a model, is that of the checkpoint it makes."""

import pytest
import torch

from checkpoints import random_model, save, tiny_config
from material import FORMS, Material
from smelt.compress.layer_error import layer_errors
from smelt.evaluate.fidelity import fidelity


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe", "granitemoe", "phimoe"])
def test_the_error_of_a_plan_is_that_of_the_checkpoint_it_makes(material, family, name, tmp_path):
    have = material(family)  # no shared experts, and all real tokens are in the sample
    predicted = layer_errors(have.source, have.facts, have.plan(**FORMS[name]), have.stats)
    compressed = have.compress(tmp_path / "out", **FORMS[name])
    for layer in fidelity(have.source, compressed, have.batches).layers:
        assert predicted[layer.name] == pytest.approx(layer.error, rel=1e-3)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "family", ["deepseek_v2", "deepseek_v3", "jamba", "qwen2_moe", "switch_transformers"]
)
def test_every_kind_of_router_has_an_error(material, family, name):
    have = material(family)
    errors = layer_errors(have.source, have.facts, have.plan(**FORMS[name]), have.stats)
    assert set(errors) == {layer.name for layer in have.facts.layers}
    assert all(0 < error < 3 for error in errors.values()), errors


@pytest.mark.parametrize("form", ["mapped", "stock"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "switch_transformers"])
def test_a_plan_that_keeps_all_experts_has_no_error(material, family, form):
    have = material(family)
    plan = have.plan(form=form, experts=8)
    assert set(layer_errors(have.source, have.facts, plan, have.stats).values()) == {0.0}


def test_merging_copies_of_one_expert_has_no_error(tmp_path):
    model = random_model(tiny_config("mixtral"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".experts." in name:
                value[:] = value[0].clone()
    model.save_pretrained(tmp_path)
    have = Material(tmp_path)
    plan = have.plan(form="mapped", experts=3)
    for error in layer_errors(have.source, have.facts, plan, have.stats).values():
        assert error < 1e-12


def test_fewer_experts_err_more(material):
    have = material("mixtral")
    errors = [
        sum(
            layer_errors(
                have.source, have.facts, have.plan(form="mapped", experts=experts), have.stats
            ).values()
        )
        for experts in (7, 5, 2)
    ]
    assert errors == sorted(errors)


def test_progress_names_every_layer(material):
    have = material("mixtral")
    told = []
    layer_errors(
        have.source,
        have.facts,
        have.plan(form="mapped", experts=4),
        have.stats,
        progress=lambda *step: told.append(step),
    )
    assert [step[1:] for step in told] == [(1, 2), (2, 2)]


def test_a_capacity_limits_calls_not_the_error(tmp_path):
    errors = []
    for capacity in (2, 1000):
        folder = tmp_path / str(capacity)
        have = Material(save("switch_transformers", folder, expert_capacity=capacity))
        for name in FORMS:
            plan = have.plan(**FORMS[name])
            errors.append(layer_errors(have.source, have.facts, plan, have.stats))
    assert errors[: len(FORMS)] == errors[len(FORMS) :]
    for name, expected in zip(FORMS, errors[: len(FORMS)], strict=True):
        compressed = have.compress(tmp_path / name, **FORMS[name])
        for layer in fidelity(have.source, compressed, have.batches).layers:
            assert expected[layer.name] == pytest.approx(layer.error, rel=1e-3)
