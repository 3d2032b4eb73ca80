"""Laws of training SaMoE: every form trains, parts of a step add up, and what the run tells."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from smelt.errors import RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM
from smelt.samoe.moe import SaMoELayer
from smelt.settings import check_recipe
from smelt.train import losses
from smelt.train.optimiser import decayed
from smelt.train.settings import TrainRecipe


def test_a_samoe_learns_and_its_checkpoints_are_models(samoe, run, tmp_path):
    result = run(samoe, steps=40, checkpoint_every=None, keep_checkpoints=3, log_every=20)
    (held_out,) = result["held_out"].values()
    assert held_out["share_of_unigram"] < 0.9

    # the last k checkpoints are there, each with its own held-out loss, the last one the result's
    assert [one["step"] for one in result["checkpoints"]] == [32, 36, 40]
    losses_ = [next(iter(one["held_out"].values())) for one in result["checkpoints"]]
    assert losses_[-1] == held_out["nats_per_token"]
    assert len(set(losses_)) == 3
    folders = tmp_path / "out" / "smelt" / "checkpoints"
    assert sorted(path.name for path in folders.iterdir()) == ["step-32", "step-36", "step-40"]
    last = AutoModelForCausalLM.from_pretrained(folders / "step-40")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in final.state_dict().items():
        assert torch.equal(value, last.state_dict()[name]), name
    assert len(AutoTokenizer.from_pretrained(folders / "step-32")) == final.config.vocab_size
    assert not list((tmp_path / "out" / "smelt").glob("checkpoint-*"))  # those to resume from


@pytest.mark.parametrize(
    "model",
    [
        {"sharing": "dense"},
        {"sharing": "none"},
        {"sharing": "union", "mix": "activation"},
        {"mix": "weight", "alpha_scope": "expert"},
        {"preset": "modern", "capacity_factor": 1.0},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_every_form_trains(samoe, run, read_log, tmp_path, model):
    result = run(samoe, model={**samoe["model"], **model}, steps=2, details_every=1)
    layers = 0 if model.get("sharing") == "dense" else 2
    assert len(result["expert_counts"]) == layers
    assert all(math.isfinite(nats) for (nats,) in read_log(tmp_path / "out", "nats"))


def test_a_masked_model_trains_on_hidden_tokens(samoe, run, tmp_path):
    result = run(samoe, objective="masked", steps=3)
    (held_out,) = result["held_out"].values()
    assert held_out["predicted_tokens"] < 0.2 * 300
    assert held_out["bits_per_byte"] is None
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.config.is_causal is False


def test_one_seed_one_model_and_the_text_does_not_depend_on_it(samoe, run, tmp_path):
    def trained(name, **changes):
        result = run(samoe, output=str(tmp_path / name), steps=2, **changes)
        return result["train_text_sha256"], load_file(tmp_path / name / "model.safetensors")

    text, weights = trained("a")
    same_text, same = trained("b")
    other_text, other = trained("c", seed=1)
    assert text == same_text == other_text
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert not torch.equal(weights["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


# --- parts of a step -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_accumulation_changes_no_loss_and_no_weight(samoe, run, read_log, tmp_path, objective):
    # A balance of weight 1 would show it: it is a product of means over the whole step.
    settings = {"steps": 3, "router_aux_loss": 1.0, "router_z_loss": 0.1, "objective": objective}

    def trained(parts):
        output = tmp_path / str(parts)
        run(samoe, output=str(output), accumulate=parts, **settings)
        told = read_log(output, "nats", "balance", "gradient_norm")
        return torch.tensor(told), load_file(output / "model.safetensors")

    told, weights = trained(1)
    for parts in (2, 4):
        other, others = trained(parts)
        assert torch.allclose(told, other, rtol=1e-5)
        for name, value in weights.items():
            if not name.endswith("k_proj.bias"):  # softmax cancels it: its gradient is rounding
                assert torch.allclose(value, others[name], atol=2e-6), name


def test_the_balance_of_parts_adds_up_to_that_of_the_whole(generator):
    logits = torch.randn(24, 4, generator=generator)
    (whole,) = losses.routed([logits], 2)
    parts = [losses.routed([part], 2)[0] for part in logits.split(6)]
    expected = losses.layer_balance(whole, whole.counts, 2)
    assert float(expected) == pytest.approx(float(losses.load_balance([logits], 2)))
    found = sum(losses.layer_balance(part, whole.counts, 2) for part in parts)
    assert float(found) == pytest.approx(float(expected))


def test_the_balance_is_summed_over_layers_unless_told_otherwise(samoe, run, read_log, tmp_path):
    run(samoe, steps=1, output=str(tmp_path / "sum"))
    run(samoe, steps=1, output=str(tmp_path / "mean"), balance="mean")
    ((summed,),) = read_log(tmp_path / "sum", "balance")
    ((mean,),) = read_log(tmp_path / "mean", "balance")
    assert summed == pytest.approx(2 * mean)
    assert summed >= 2 * 0.99


def test_bfloat16_trains_float32_weights(samoe, run, read_log, tmp_path):
    run(samoe, steps=3, output=str(tmp_path / "low"), precision="bfloat16")
    run(samoe, steps=3, output=str(tmp_path / "full"))
    low, full = (torch.tensor(read_log(tmp_path / name, "nats")) for name in ("low", "full"))
    assert torch.allclose(low, full, rtol=5e-3)
    assert not torch.equal(low, full)
    saved = load_file(tmp_path / "low" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())


def test_recomputing_activations_changes_no_loss(samoe, run, read_log, tmp_path, monkeypatch):
    original, calls = SaMoELayer.forward, []

    def counting(layer, *arguments):
        calls.append(torch.is_grad_enabled())
        return original(layer, *arguments)

    monkeypatch.setattr(SaMoELayer, "forward", counting)
    run(samoe, steps=2, output=str(tmp_path / "full"))
    once = sum(calls)
    calls.clear()
    run(samoe, steps=2, output=str(tmp_path / "less"), gradient_checkpointing=True)
    assert sum(calls) == 2 * once == 8  # two steps of two layers, run again in the backward
    assert read_log(tmp_path / "less", "nats") == read_log(tmp_path / "full", "nats")


# --- what is decayed -----------------------------------------------------------------------------


def test_alpha_beta_norms_and_biases_do_not_decay():
    config = SaMoEConfig.from_preset(
        "paper",
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=2,
        moe_every=1,
        alpha_scope="expert",  # has two axes
    )
    model = SaMoEForCausalLM(config)
    names = set(decayed(model))
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        is_free = parameter.ndim < 2 or last in {"alpha", "beta"} or "bias" in last
        assert (name in names) != is_free, name
    assert {"model.embed_tokens.weight", "model.pools.0.up"} <= names
    assert model.model.pools[0].up_bias.ndim > 1  # else the law above says nothing of it


# --- what is told --------------------------------------------------------------------------------


def test_the_log_tells_speed_memory_and_routing(samoe, run, tmp_path):
    result = run(samoe, steps=4, details_every=2, profile_every=3, peak_flops=1e12)
    lines = [json.loads(x) for x in (tmp_path / "out/smelt/log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "nats" in line]
    tokens = 8 * 16
    for number, line in enumerate(steps, start=1):
        assert (line["step"], line["tokens"]) == (number, number * tokens)
        speed = 1e3 * tokens / line["milliseconds"]
        assert line["tokens_per_second"] == pytest.approx(speed, rel=1e-2)
        assert line["peak_memory_bytes"] > 1 << 20
        assert line["mfu"] == pytest.approx(
            line["tokens_per_second"] * result["training_flops_per_token"] / 1e12, abs=1e-4
        )
    detailed = [line for line in steps if "alpha" in line]
    assert [line["step"] for line in detailed] == [2, 4]
    for name in ("routing_entropy", "load_balance", "dropped", "alpha", "beta"):
        assert len(detailed[-1][name]) == 2, name
    assert [len(alpha) for alpha in detailed[-1]["alpha"]] == [2, 2]  # P = 2

    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert result["training_flops_per_token"] == 3 * config.flops_per_token(context=8)

    (profile,) = [line for line in lines if "phases" in line]
    assert profile["step"] == 3
    phases = {"data", "router", "dispatch", "experts", "attention", "head", "optimizer"}
    assert phases <= profile["phases"].keys()
    assert all(value >= 0 for value in profile["phases"].values())


def test_tensorboard_gets_the_numbers_of_the_log(samoe, run, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(samoe, steps=2, tensorboard=True)
    board = events.EventAccumulator(str(tmp_path / "out" / "smelt" / "tensorboard"))
    board.Reload()
    assert {"nats", "learning_rate"} <= set(board.Tags()["scalars"])
    assert [one.step for one in board.Scalars("nats")] == [1, 2]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"num_experts": 0}}, "num_experts = 0: it is .*at least 1"),
        (
            {"model": {"hidden_size": 20}},
            "hidden_size = 20.*multiples of 8. The nearest: 16 and 24",
        ),
        ({"model": {"num_expert": 4}}, "no such setting. Did you mean: num_experts"),
        ({"model": {"preset": "papr"}}, "model.preset = 'papr' cannot be.*'paper' or 'modern'"),
        ({"batch_size": 6, "accumulate": 4}, "make batch_size a multiple of accumulate"),
        ({"text": {"tokens": 100}}, "6 sequences of 16 tokens, fewer than the 8 of one batch"),
        ({"text": {"sequence_length": 64}}, "Raise the one or lower the other"),
        ({"seeds": [1, 1]}, "every seed is named once"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_recipe_that_cannot_be_trained_says_why(samoe, run, tmp_path, changes, message):
    values = dict(samoe)
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    with pytest.raises(RecipeError, match=message):
        run(values)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_only_samoe_is_masked_and_has_presets(samoe):
    stock = {**samoe, "model": {"model_type": "qwen3_moe"}}
    with pytest.raises(RecipeError, match="objective masked is for model_type samoe"):
        check_recipe({**stock, "objective": "masked"}, TrainRecipe)
    preset = {"model_type": "qwen3_moe", "preset": "paper"}
    with pytest.raises(RecipeError, match="preset belongs to model_type samoe"):
        check_recipe({**samoe, "model": preset}, TrainRecipe)
