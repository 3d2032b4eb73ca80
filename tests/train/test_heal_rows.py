"""Laws of pruning S while a model heals: what is stored, what stays, what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from healing_material import run
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.errors import RecipeError
from smelt.train.heal_rows import PrunedRows, ranks_of
from smelt.train.heal_settings import DecomposeSettings

EXPERTS = "model.layers.0.mlp.experts"
SIZES = {"gate": (32, 16), "up": (32, 16), "down": (16, 32)}  # in, out


def tensors(place):
    return {key: entry.read() for key, entry in Checkpoint.open(place).tensors.items()}


def opened(student, steps=10, **settings):
    model = load_model(Checkpoint.open(student)).float()
    return model, PrunedRows(model, DecomposeSettings(**{"rank": 4, **settings}), steps)


def test_the_result_is_compact_and_is_the_model_that_was_measured(values, tmp_path):
    result = run(values("mapped", decompose={"rank": 4, "keep": 0.25}))
    out = tmp_path / "out"
    found, config = tensors(out), json.loads((out / "config.json").read_text())
    spec = config["factored_experts"][EXPERTS]
    kept = entries = 0
    for m, (into, height) in SIZES.items():
        rows, ids = found[f"{EXPERTS}.{m}_rows"], found[f"{EXPERTS}.{m}_row_ids"]
        assert rows.shape == (spec[m]["rows"], into) and spec[m]["rank"] == 4
        assert found[f"{EXPERTS}.{m}_u"].shape == (4, height, 4)
        assert torch.equal(ids, ids.sort().values) and rows.ne(0).any(-1).all()
    for layer in config["factored_experts"]:
        for m, (into, height) in SIZES.items():
            kept += found[f"{layer}.{m}_rows"].numel()
            entries += 4 * height * into
    assert 0.25 - 32 / entries < kept / entries <= 0.25
    assert not any(key.endswith(("_s", "_proj")) and ".experts." in key for key in found)
    assert result["parameters"] == sum(t.numel() for t in found.values() if t.is_floating_point())
    model = AutoModelForCausalLM.from_pretrained(out)  # in its own form
    again = run(values("mapped"), steps=1, student=str(out), output=str(tmp_path / "again"))
    (after,), (before,) = result["after"].values(), again["before"].values()
    assert after == pytest.approx(before, rel=1e-6)
    assert type(model).__name__ == "SmeltMappedQwen3MoeForCausalLM"


def test_at_learning_rate_0_rows_go_by_their_gradients_and_nothing_else_changes(values, tmp_path):
    given = values("mapped", learning_rate=0, decompose={"rank": 4, "keep": 0.25})
    run(given)
    model, rows = opened(given["student"])
    found = tensors(tmp_path / "out")
    state = model.state_dict()
    assert torch.equal(found["model.embed_tokens.weight"], state["model.embed_tokens.weight"])
    for one in rows.matrices:
        key = f"{one.module}.{one.name}"
        assert torch.equal(found[f"{key}_u"], state[f"{key}_u"])
        assert torch.equal(found[f"{key}_v"], state[f"{key}_v"])
        ids = found[f"{key}_row_ids"].long()
        assert torch.equal(found[f"{key}_rows"], one.rows.flatten(0, 1)[ids])


def test_opening_changes_no_prediction(values):
    given = values("mapped")
    ids = torch.arange(3, 60)[None]
    before = load_model(Checkpoint.open(given["student"])).float()(ids).logits
    model, _ = opened(given["student"])
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_a_row_that_goes_is_zero_and_the_mask_says_so(values):
    model, rows = opened(values("mapped")["student"], keep=0.3)
    ids = torch.arange(3, 60)[None]
    for step in range(1, 11):
        model.zero_grad()
        model.requires_grad_(True)
        model(ids, labels=ids).loss.backward()
        rows.observe()
        rows.prune(step)
        for one in rows.matrices:
            assert torch.equal(one.rows.ne(0).any(-1), one.mask)
    entries = sum(one.rows.numel() for one in rows.matrices)
    kept = sum(int(one.mask.sum()) * one.rows.shape[-1] for one in rows.matrices)
    assert 0.3 - 32 / entries < kept / entries <= 0.3


def test_importances_that_are_no_numbers_stop_the_run(values):
    _, rows = opened(values("mapped")["student"])
    rows.matrices[1].importance[0, 3] = torch.nan
    with pytest.raises(RecipeError, match="step 1: importances of model.layers.0.mlp.experts.gate"):
        rows.prune(1)


def test_a_rank_too_high_and_a_stock_student_are_refused(values):
    with pytest.raises(RecipeError, match=r"rank = 17: down of .*experts is 32 × 16.* most 16"):
        opened(values("mapped")["student"], rank=17)
    stock = load_model(Checkpoint.open(values("stock")["student"]))
    with pytest.raises(RecipeError, match="stock form, which has no place"):
        ranks_of(stock, 4)
    with pytest.raises(RecipeError, match="rank = 17"):  # and before any text is read
        run(values("mapped", decompose={"rank": 17}), text={"train": ["/nowhere/at.all"]})
