"""Laws of dropping hidden units: what is scored, what stays, and a result any runtime loads."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints import save
from compress.laws import TOKENS, Ground, batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import calibrate
from smelt.compress.facts import read_facts
from smelt.compress.layer_error import layer_errors
from smelt.compress.pipeline import check_possible
from smelt.compress.units import keep_units, unit_scores
from smelt.errors import CheckpointError, PlanError
from smelt.experts import ExpertBank, apply, permute_hidden
from smelt.recipe import CompressRecipe

G, F, D = 3, 8, 5


@pytest.fixture
def bank(generator):
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return ExpertBank(up=draw(G, F, D), down=draw(G, D, F), gate=draw(G, F, D), up_bias=draw(G, F))


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground.make(tmp_path_factory.mktemp("source"), moe_intermediate_size=32)


@pytest.fixture
def seen(generator):
    """Inputs, and which of the first two experts they go to; nobody chose the last."""
    group = torch.randint(0, 2, (40, 2), generator=generator)
    group[:20, 1] = -1
    return torch.randn(40, D, generator=generator), group


def test_the_score_of_a_unit_is_the_mean_square_of_what_the_output_loses_with_it(bank, seen):
    sample, group = seen
    found = unit_scores(bank, sample, group)
    for expert in range(2):
        rows = [i for i in range(40) if expert in group[i].tolist()]
        x = sample[rows]
        for unit in range(F):
            down = bank.down.clone()
            down[expert, :, unit] = 0
            lost = apply(bank, expert, x) - apply(replace(bank, down=down), expert, x)
            expected = lost.double().square().sum(1).mean()
            torch.testing.assert_close(found[expert, unit], expected, rtol=1e-4, atol=1e-6)


def test_an_expert_that_nobody_chose_is_scored_by_its_weights(bank, seen):
    squares = bank.up[2].square().sum(1) * bank.gate[2].square().sum(1)
    expected = squares * bank.down[2].square().sum(0)
    torch.testing.assert_close(unit_scores(bank, *seen)[2], expected.double())


def test_the_best_units_stay_in_their_order_and_dead_ones_cost_nothing(bank, seen, generator):
    down = bank.down.clone()
    down[:, :, [1, 4, 6]] = 0
    dead = replace(bank, down=down)
    kept = keep_units(dead, unit_scores(dead, *seen), F - 3)
    alive = [0, 2, 3, 5, 7]
    assert torch.equal(kept.up, bank.up[:, alive])
    assert torch.equal(kept.up_bias, bank.up_bias[:, alive])
    x = torch.randn(6, D, generator=generator)
    for expert in range(G):
        torch.testing.assert_close(apply(kept, expert, x), apply(dead, expert, x))


def test_reordering_hidden_units_changes_nothing(bank, seen, generator):
    order = torch.stack([torch.randperm(F, generator=generator) for _ in range(G)])
    other = permute_hidden(bank, order)
    x = torch.randn(6, D, generator=generator)
    one = keep_units(bank, unit_scores(bank, *seen), 5)
    two = keep_units(other, unit_scores(other, *seen), 5)
    for expert in range(G):
        torch.testing.assert_close(apply(one, expert, x), apply(two, expert, x))


LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert "smelt" not in sys.modules
tokens = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(tokens).logits, sys.argv[3])
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"experts": None},  # every expert stays, smaller
        {"method": "reap"},
        {"method": "m-smoe"},
        {"method": "m-smoe", "sequential": True},
    ],
    ids=str,
)
def test_the_result_is_an_ordinary_checkpoint_of_the_predicted_size(ground, tmp_path, settings):
    plan = ground.plan(tmp_path / "out", hidden_units=16, **settings)
    out = ground.compress(tmp_path / "out", hidden_units=16, **settings)
    assert json.loads((out / "config.json").read_text())["moe_intermediate_size"] == 16
    tensors = [t for f in out.glob("*.safetensors") for t in load_file(f).values()]
    assert sum(t.nbytes for t in tensors) == plan.predicted.bytes_after
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert sum(p.numel() for p in model.parameters()) == plan.predicted.params_after
    torch.save(TOKENS, tmp_path / "tokens")
    command = [sys.executable, "-c", LOADS, out, tmp_path / "tokens", tmp_path / "logits"]
    subprocess.run(command, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), model(TOKENS).logits)


def test_the_error_that_a_plan_measures_holds_the_units_that_leave(ground, tmp_path):
    whole = ground.plan(tmp_path / "a", method="reap")
    thin = ground.plan(tmp_path / "b", method="reap", hidden_units=16)
    alone = ground.plan(tmp_path / "c", experts=None, hidden_units=16)
    measured = [
        layer_errors(ground.checkpoint, ground.facts, plan, ground.stats)
        for plan in (whole, thin, alone)
    ]
    for name in measured[0]:
        assert measured[1][name] > measured[0][name]
        assert 0 < measured[2][name] < 1


SAFE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe"]
UNSAFE = ["deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "jamba"]


def wide(family, folder):
    """A tiny checkpoint whose experts have 48 units, a number that no other size has."""
    field = (
        "intermediate_size"
        if family in ("mixtral", "olmoe", "gpt_oss", "granitemoe", "phimoe", "jamba")
        else "moe_intermediate_size"
    )
    save(family, folder, **{field: 48})
    return Checkpoint.open(folder)


@pytest.mark.parametrize("family", SAFE)
def test_families_whose_field_sizes_experts_only_hold_fewer_units(family, tmp_path):
    checkpoint = wide(family, tmp_path / "source")
    facts = read_facts(checkpoint)
    stats = calibrate(checkpoint, batches(2), text="tokens", sample_tokens=64)
    made = Ground(tmp_path / "source", checkpoint, facts, stats)
    out = made.compress(tmp_path / "out", method="reap", hidden_units=32)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert (
        sum(p.numel() for p in model.parameters())
        == made.plan(tmp_path / "x", method="reap", hidden_units=32).predicted.params_after
    )


@pytest.mark.parametrize("family", UNSAFE)
def test_families_whose_field_sizes_more_are_refused_before_anything_is_read(family, tmp_path):
    checkpoint = wide(family, tmp_path / "source")
    recipe = CompressRecipe(source="x", output="y", hidden_units=32)
    with pytest.raises(CheckpointError, match="leave hidden_units out"):
        check_possible(checkpoint, read_facts(checkpoint), recipe)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hidden_units": 20}, "a multiple of 16, 16 to 16"),
        ({"hidden_units": 32}, "a multiple of 16, 16 to 16"),
        ({"hidden_units": 16, "form": "mapped"}, "set form: stock, not mapped"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused(ground, tmp_path, settings, said):
    with pytest.raises(PlanError, match=said):
        ground.plan(tmp_path / "out", **settings)
