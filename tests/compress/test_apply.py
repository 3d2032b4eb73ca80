"""Laws of a compressed checkpoint: its bytes, its forms, and what a killed run leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.laws import TOKENS, Ground, batches, dies_after
from smelt.checkpoint import sink as sinks
from smelt.checkpoint.source import Checkpoint
from smelt.compress.apply import apply
from smelt.compress.calibrate import calibrate
from smelt.compress.facts import read_facts
from smelt.compress.pipeline import run_plan
from smelt.compress.plan import Plan
from smelt.errors import CheckpointError, PlanError


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground.make(tmp_path_factory.mktemp("source"), num_hidden_layers=3)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


@pytest.mark.parametrize("form", ["stock", "expanded"])
def test_keeping_every_expert_leaves_the_checkpoint_bit_identical(ground, tmp_path, form):
    out = ground.compress(tmp_path / "out", form=form, experts=8)
    before, after = tensors(ground.folder), tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"budget": "uniform"},
        {"excluded": (0,), "budget": "global"},
        {"sequential": True, "align": "activations"},
        {"align": "none", "weights": "mean"},
    ],
    ids=str,
)
def test_the_mapped_form_is_the_expanded_form(ground, tmp_path, settings):
    mapped = ground.compress(tmp_path / "mapped", form="mapped", **settings)
    expanded = ground.compress(tmp_path / "expanded", form="expanded", **settings)
    torch.testing.assert_close(logits(mapped), logits(expanded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["stock", "mapped", "expanded"])
@pytest.mark.parametrize("sequential", [False, True])
def test_bytes_on_disk_are_what_the_plan_predicted(ground, tmp_path, form, sequential):
    plan = ground.plan(tmp_path / "out", form=form, sequential=sequential)
    out = ground.compress(tmp_path / "out", form=form, sequential=sequential)
    assert sum(t.nbytes for t in tensors(out).values()) == plan.predicted.bytes_after
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == plan.predicted.params_after


@pytest.mark.parametrize("form", ["mapped", "expanded"])
def test_sequential_decides_a_layer_on_the_stream_of_the_compressed_ones(ground, tmp_path, form):
    """Layer 1 is decided as one-shot decides it for a checkpoint whose layer 0 is compressed."""
    settings = {"form": form, "budget": "uniform"}
    sequential = ground.compress(tmp_path / "sequential", sequential=True, **settings)
    first = ground.plan(tmp_path / "first", form="expanded", excluded=(1, 2), budget="uniform")
    folder = apply(ground.checkpoint, first, tmp_path / "first", stats=ground.stats)
    prefix = Checkpoint.open(folder)
    stats = calibrate(prefix, batches(2), text="tokens", sample_tokens=64)
    recipe = ground.recipe(tmp_path / "out", **settings)
    expected = run_plan(prefix, stats, recipe, read_facts(prefix)).layers[1]
    found = Plan.load(sequential / "smelt" / "plan.json").layers[1]
    assert found.dominants == expected.dominants
    assert found.labels == expected.labels
    assert found.weights == pytest.approx(expected.weights)
    one_shot = ground.plan(tmp_path / "out", **settings).layers[1]
    assert found.weights != one_shot.weights


def test_a_global_budget_gives_layers_different_counts_that_add_up(ground, tmp_path):
    plan = ground.plan(tmp_path / "out", form="mapped", budget="global", experts=3)
    counts = [layer.num_groups for layer in plan.layers]
    assert sum(counts) == 3 * len(counts)
    out = ground.compress(tmp_path / "out", form="mapped", budget="global", experts=3)
    config = json.loads((out / "config.json").read_text())
    assert list(config["mapped_experts"].values()) == counts


LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **{options})
assert ("smelt" in sys.modules) == {has_smelt}
tokens = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model.eval()(tokens).logits, sys.argv[3])
assert model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
"""


@pytest.mark.parametrize(
    ("form", "imports", "options"),
    [
        ("stock", "", "{}"),
        ("expanded", "", "{}"),
        ("mapped", "", "{'trust_remote_code': True}"),
        ("mapped", "import smelt", "{}"),
    ],
)
def test_a_result_loads_in_a_fresh_process_with_identical_logits(
    ground, tmp_path, form, imports, options
):
    out = ground.compress(tmp_path / "out", form=form)
    torch.save(TOKENS, tmp_path / "tokens.pt")
    code = LOADS.format(imports=imports, options=options, has_smelt=bool(imports))
    subprocess.run(
        [sys.executable, "-c", code, out, tmp_path / "tokens.pt", tmp_path / "logits.pt"],
        check=True,
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(out))


def test_applying_a_plan_twice_gives_the_same_bytes(ground, tmp_path):
    plan = ground.plan(tmp_path / "out")
    plan.save(tmp_path / "plan.json")
    first = apply(ground.checkpoint, plan, tmp_path / "first")
    again = apply(
        Checkpoint.open(ground.folder), Plan.load(tmp_path / "plan.json"), tmp_path / "again"
    )
    assert contents(first) == contents(again)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("moment", [0, 1, 3])
def test_a_killed_run_resumed_gives_the_bytes_of_an_uninterrupted_one(
    ground, tmp_path, monkeypatch, sequential, moment
):
    settings = {"form": "mapped", "sequential": sequential}
    whole = contents(ground.compress(tmp_path / "out", **settings))
    (tmp_path / "out").rename(tmp_path / "whole")
    with dies_after(monkeypatch, moment):
        ground.compress(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == moment
    assert contents(ground.compress(tmp_path / "out", **settings)) == whole
    assert not (tmp_path / "out.partial").exists()


def test_another_compression_does_not_touch_an_unfinished_one(ground, tmp_path, monkeypatch):
    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sinks.Sink, "finish", dies)
    with pytest.raises(KeyboardInterrupt):
        ground.compress(tmp_path / "out")
    monkeypatch.undo()
    before = contents(tmp_path / "out.partial")
    with pytest.raises(CheckpointError, match="another unfinished compression"):
        ground.compress(tmp_path / "out", experts=6)
    assert contents(tmp_path / "out.partial") == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sharded_tied_checkpoints_keep_their_type_and_what_is_not_an_expert(tmp_path, dtype):
    model_folder = tmp_path / "source"
    ground = Ground.make(model_folder, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    (sharded / "chat_template.jinja").write_text("{{ messages }}")
    ground = Ground(sharded, Checkpoint.open(sharded), ground.facts, ground.stats)
    stats = type(ground.stats)(
        ground.stats.layers, ground.checkpoint.fingerprint, "t", ground.stats.num_tokens
    )
    ground = Ground(sharded, ground.checkpoint, ground.facts, stats)
    out = ground.compress(tmp_path / "out")
    before, after = tensors(sharded), tensors(out)
    assert "lm_head.weight" not in after
    same = [k for k in after if ".experts." not in k and ".gate." not in k]
    assert all(torch.equal(before[k], after[k]) for k in same)
    assert {t.dtype for t in after.values()} == {dtype}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "generation_config.json").read_bytes() == (
        sharded / "generation_config.json"
    ).read_bytes()


def test_the_bytes_do_not_depend_on_the_number_of_workers(ground, tmp_path):
    plan = ground.plan(tmp_path / "out")
    one = apply(ground.checkpoint, plan, tmp_path / "one", workers=1)
    many = apply(ground.checkpoint, plan, tmp_path / "many", workers=4)
    assert contents(one) == contents(many)


def test_a_plan_or_statistics_of_another_checkpoint_are_refused(ground, tmp_path):
    plan = ground.plan(tmp_path / "out")
    other = plan.model_copy(update={"checkpoint": "0" * 64})
    with pytest.raises(PlanError, match="plan is of checkpoint"):
        apply(ground.checkpoint, other, tmp_path / "out")
    other = plan.model_copy(update={"statistics": "0" * 64})
    with pytest.raises(PlanError, match="other statistics"):
        apply(ground.checkpoint, other, tmp_path / "out", stats=ground.stats)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_walk_is_the_models_own_forward(ground):
    from smelt.checkpoint.walk import Walk

    walk = Walk(ground.checkpoint, [{"input_ids": rows} for rows in TOKENS.split(3)])
    outputs = [out.logits for _, out in walk.run()]
    model = AutoModelForCausalLM.from_pretrained(ground.folder)
    with torch.no_grad():
        expected = [model(rows).logits for rows in TOKENS.split(3)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
