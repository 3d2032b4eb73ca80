"""Laws of healing: what is trained, towards what, and what the result is."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from healing_material import original, run, student
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.verify import verify
from smelt.train import heal_model


def tensors(place):
    checkpoint = Checkpoint.open(place)
    return {key: entry.read() for key, entry in checkpoint.tensors.items()}


PURE = {"cross_entropy": 0.0, "weight": 1.0, "temperature": 1.0}
"""Towards the teacher and nothing else: a random one has nothing to say of the text."""


def only(found):
    (one,) = found.values()
    return one


@pytest.mark.parametrize("form", ["mapped", "stock"])
def test_healing_brings_a_student_nearer_to_its_teacher_in_its_own_form(values, tmp_path, form):
    result = run(values(form, distill=PURE), steps=16)
    before, after = only(result["before"]), only(result["after"])
    assert after["kl_to_teacher"] < 0.8 * before["kl_to_teacher"]
    assert json.loads((tmp_path / "out/smelt/healing.json").read_text()) == result

    source = Checkpoint.open(values(form)["student"]).folder
    old, new = tensors(source), tensors(tmp_path / "out")
    assert {k: (t.shape, t.dtype) for k, t in old.items()} == {
        k: (t.shape, t.dtype) for k, t in new.items()
    }
    files = {p.relative_to(source) for p in source.rglob("*") if p.suffix != ".safetensors"}
    there = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")}
    assert {f for f in files if "index" not in f.name} <= there
    assert verify(tmp_path / "out") == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__.startswith("Qwen3" if form == "stock" else "SmeltMappedQwen3")


@pytest.mark.parametrize("train", ["all", "experts", "routers"])
def test_only_what_is_named_is_trained(values, tmp_path, train):
    given = values("mapped", train=train)
    run(given, steps=2)
    old, new = tensors(given["student"]), tensors(tmp_path / "out")
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    routers = {key for key in old if key.endswith("mlp.gate.weight")}
    experts = {key for key in old if ".experts." in key and not key.endswith("expert_map")}
    assert routers and experts
    if train == "all":
        assert experts <= changed and not changed & routers and len(changed) > len(experts)
    else:
        assert changed == {"experts": experts, "routers": routers}[train]


def test_routers_are_trained_too_when_asked(values, tmp_path):
    given = values("mapped", train="experts", train_routers=True)
    run(given, steps=2)
    old, new = tensors(given["student"]), tensors(tmp_path / "out")
    assert not torch.equal(
        old["model.layers.0.mlp.gate.weight"], new["model.layers.0.mlp.gate.weight"]
    )


def test_without_a_weight_the_teacher_changes_nothing(values, folder, tmp_path):
    run(values(), steps=2, distill={"weight": 0})
    other = tmp_path / "other"
    run(values(), steps=2, distill={"weight": 0}, output=str(other), cache={"top_k": 4})
    one, two = tensors(tmp_path / "out"), tensors(other)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_parts_of_a_batch_add_up_to_the_batch(values, tmp_path):
    run(values(), steps=2)
    run(values(), steps=2, accumulate=2, output=str(tmp_path / "parts"))
    one, two = tensors(tmp_path / "out"), tensors(tmp_path / "parts")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-4)


def test_lora_is_merged_into_an_ordinary_checkpoint(values, tmp_path):
    given = values("mapped", train="lora", lora={"rank": 2}, distill=PURE)
    result = run(given, steps=16, learning_rate=1e-2)
    old, new = tensors(given["student"]), tensors(tmp_path / "out")
    assert {k: t.shape for k, t in old.items()} == {k: t.shape for k, t in new.items()}
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert any(".experts." in key for key in changed)
    assert any("q_proj" in key for key in changed)
    assert not any("mlp.gate" in key or "embed" in key or "norm" in key for key in changed)
    assert only(result["after"])["kl_to_teacher"] < only(result["before"])["kl_to_teacher"]
    stacked = next(key for key in changed if key.endswith("0.mlp.experts.down_proj"))
    change = (new[stacked] - old[stacked]).float()
    assert int(torch.linalg.matrix_rank(change[0], rtol=1e-3)) <= 2


def test_the_faithful_preset_drops_nothing_out(values, folder, tmp_path):
    from transformers import AutoConfig

    given = values("stock", distill={"preset": "faithful"})
    run(given, steps=2)
    noisy = tmp_path / "noisy"
    model = AutoModelForCausalLM.from_pretrained(given["student"])
    config = AutoConfig.from_pretrained(given["student"])
    config.attention_dropout = 0.5
    model.save_pretrained(noisy)
    config.save_pretrained(noisy)
    Checkpoint.open(given["student"]).tokenizer.save_pretrained(noisy)
    run(given, steps=2, student=str(noisy), output=str(tmp_path / "second"))
    one, two = tensors(tmp_path / "out"), tensors(tmp_path / "second")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_faithful_divergence_is_a_sum_over_positions_divided_by_the_batch(values, tmp_path):
    run(values(), steps=1, distill={"preset": "faithful"})
    run(values(), steps=1, output=str(tmp_path / "mean"))
    lines = [
        json.loads((tmp_path / name / "smelt/heal-log.jsonl").read_text().splitlines()[0])
        for name in ("out", "mean")
    ]
    # 15 of 16 positions have a target; the last one is compared too
    assert lines[0]["kl"] / lines[1]["kl"] == pytest.approx(16, rel=0.1)
    assert lines[0]["nats"] == pytest.approx(lines[1]["nats"], rel=1e-5)


def test_a_healed_checkpoint_can_be_healed_again(values, tmp_path):
    first = run(values(), steps=1)
    second = run(values(), steps=1, student=str(tmp_path / "out"), output=str(tmp_path / "again"))
    found = json.loads((tmp_path / "again/smelt/healing.json").read_text())
    assert found == second and found["earlier"] == first
    assert second["before"] == first["after"]


def test_router_parameters_are_found_by_the_anatomy(folder):
    from smelt.checkpoint.anatomy import dissect

    for form in ("mapped", "stock"):
        checkpoint = Checkpoint.open(student(folder, form, "qwen3_moe"))
        anatomy = dissect(checkpoint)
        names = heal_model.router_parameters(checkpoint.model, anatomy)
        assert names == {f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)}


# --- encoder–decoder -----------------------------------------------------------------------------


def test_an_encoder_decoder_heals_on_spans(values, tmp_path):
    given = values("mapped", "switch_transformers", distill=PURE)
    result = run(given, learning_rate=3e-4)
    assert only(result["after"])["kl_to_teacher"] < only(result["before"])["kl_to_teacher"]
    old, new = tensors(given["student"]), tensors(tmp_path / "out")
    assert {k: t.shape for k, t in old.items()} == {k: t.shape for k, t in new.items()}
    routers = [key for key in old if "router" in key]
    assert routers and all(torch.equal(old[key], new[key]) for key in routers)


def test_the_teacher_of_a_student_that_is_its_original_is_no_distance_away(values, folder):
    result = run(values(student=str(original(folder, "qwen3_moe"))), steps=1)
    assert abs(only(result["before"])["kl_to_teacher"]) < 1e-6
