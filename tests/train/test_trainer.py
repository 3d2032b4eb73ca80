"""Laws of training: what is learnt, what is saved, what is refused before the first batch."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from smelt.errors import CalibrationError, RecipeError
from smelt.settings import check_recipe, dump_recipe, load_recipe
from smelt.text import make_blocks, parse_source, tokenize
from smelt.train import losses, measure, step
from smelt.train.data import train_tokenizer
from smelt.train.trainer import TrainRecipe, train

MODELS = {
    "qwen3_moe": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": True,
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "deepseek_v3": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}


@pytest.fixture
def values(text, tmp_path):
    """The settings of a run that takes a second or two."""
    return {
        "model": {"model_type": "qwen3_moe", **MODELS["qwen3_moe"]},
        "tokenizer": {"vocab_size": 300},
        "text": {
            "train": [str(text / "train.txt")],
            "held_out": [str(text / "held_out.txt")],
            "tokens": 4000,
            "held_out_tokens": 300,
            "sequence_length": 32,
        },
        "output": str(tmp_path / "out"),
        "steps": 60,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "log_every": 10,
        "evaluate_every": 30,
    }


# --- what training gives -------------------------------------------------------------------------


def test_training_learns_saves_and_says_so(values, run, tmp_path, text):
    result = run(values)
    out = tmp_path / "out"
    held_out = result["held_out"][str(text / "held_out.txt")]

    # the held-out loss is below what token frequencies alone can reach
    assert held_out["share_of_unigram"] < 0.6
    assert held_out["nats_per_token"] == pytest.approx(
        held_out["share_of_unigram"] * held_out["unigram_nats_per_token"]
    )
    assert 0 < held_out["bits_per_byte"] < 8
    counts = torch.tensor(result["expert_counts"])
    assert counts.shape == (2, 4)
    assert (counts.sum(1) == counts[0].sum()).all()

    # the folder says the same, and holds the recipe and the log
    assert json.loads((out / "smelt" / "training.json").read_text()) == result
    assert load_recipe(out / "smelt" / "recipe.yaml", TrainRecipe).steps == 60
    log = [json.loads(line) for line in (out / "smelt" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "nats" in line] == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in log if "held_out" in line] == [30, 60]
    assert log[-1]["tokens"] == 60 * 4 * 32
    assert not list(tmp_path.glob("*.partial"))

    # the loss stated is that of the weights saved, as plain transformers loads them
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    blocks = tokenize(
        [parse_source(str(text / "held_out.txt"))],
        tokenizer,
        num_tokens=300,
        sequence_length=32,
    )
    assert blocks.sha256 == held_out["text_sha256"]
    batch = blocks.batches(len(blocks.input_ids))[0]
    labels = batch["input_ids"].masked_fill(~blocks.mask, -100)
    with torch.no_grad():
        loss = float(model(**batch, labels=labels).loss)
    assert held_out["nats_per_token"] == pytest.approx(loss, rel=1e-4)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_one_recipe_gives_one_model(values, run, tmp_path):
    first = run(values, steps=3, output=str(tmp_path / "a"))
    again = run(values, steps=3, output=str(tmp_path / "b"))
    other = run(values, steps=3, seed=1, output=str(tmp_path / "c"))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert first["held_out"] == again["held_out"] != other["held_out"]


def test_an_encoder_decoder_family_trains_by_span_corruption(values, run):
    model = {"model_type": "switch_transformers", **MODELS["switch_transformers"]}
    result = run(values, model=model, tokenizer={"vocab_size": 320, "sentinels": 8}, steps=20)
    assert len(result["expert_counts"]) == 2  # one sparse layer in the encoder, one in the decoder
    (held_out,) = result["held_out"].values()
    assert held_out["share_of_unigram"] < 1.3
    assert held_out["bits_per_byte"] is None  # its tokens are not the text


def test_a_family_with_a_dense_first_layer_trains(values, run):
    model = {"model_type": "deepseek_v3", **MODELS["deepseek_v3"]}
    result = run(values, model=model, steps=2)
    assert [len(layer) for layer in result["expert_counts"]] == [4]


def test_a_model_without_router_logits_trains_without_balance_and_warns(values, monkeypatch):
    def blind(*arguments):
        return replace(measure.forward(*arguments), router_logits=[])

    monkeypatch.setattr(step, "forward", blind)
    with pytest.warns(UserWarning, match="router_aux_loss is left out"):
        train(check_recipe({**values, "steps": 2}, TrainRecipe))


def test_progress_is_told_step_by_step(values):
    told = []
    recipe = check_recipe({**values, "steps": 3}, TrainRecipe)
    train(recipe, on_step=lambda *step: told.append(step))
    assert [step[:2] for step in told] == [(1, 3), (2, 3), (3, 3)]
    assert all(0 < step[2] < 20 for step in told)


# --- the tokenizer -------------------------------------------------------------------------------


def test_a_fitted_tokenizer_gives_every_text_back(text, tmp_path):
    tokenizer = train_tokenizer([parse_source(str(text / "train.txt"))], vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for sample in ("one two three.\n", "  def f(x):\n\treturn '𝄞 ä'\n", "\0\x7f"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
        assert loaded(sample)["input_ids"] == tokenizer(sample)["input_ids"]
    assert loaded.eos_token == "<|endoftext|>"
    assert len(tokenizer) <= 300


def test_a_tokenizer_is_fitted_the_same_in_another_process(text):
    code = (
        "import sys, hashlib; from smelt.text import parse_source;"
        "from smelt.train.data import train_tokenizer;"
        "t = train_tokenizer([parse_source(sys.argv[1])], vocab_size=320);"
        "sys.stdout.write(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code, str(text / "train.txt")]
    there = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    here = train_tokenizer([parse_source(str(text / "train.txt"))], vocab_size=320)
    assert there == hashlib.sha256(here.backend_tokenizer.to_str().encode()).hexdigest()


# --- losses --------------------------------------------------------------------------------------


def test_load_balance_is_one_when_even_and_the_number_of_experts_when_not():
    even = torch.eye(8).repeat(4, 1) * 100
    one = torch.zeros(32, 8)
    one[:, 3] = 100
    assert float(losses.load_balance([even], 1)) == pytest.approx(1)
    assert float(losses.load_balance([one], 1)) == pytest.approx(8)


def test_uneven_layers_do_not_make_up_for_each_other():
    first, second = torch.zeros(32, 2), torch.zeros(32, 2)
    first[:, 0], second[:, 1] = 100, 100
    assert float(losses.load_balance([first, second], 1)) == pytest.approx(2)


def test_entropy_is_one_for_even_load_and_zero_for_one_expert():
    assert losses.routing_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1)
    assert losses.routing_entropy(torch.tensor([0, 9, 0, 0])) == pytest.approx(0)
    assert losses.routing_entropy(torch.tensor([5, 5, 0, 0])) == pytest.approx(0.5)


def test_unigram_nats_are_those_counted_by_hand():
    nats = losses.unigram_nats(torch.tensor([2, 1, 0]), torch.tensor([0, 2]))
    assert nats == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


def test_padding_and_the_last_position_predict_nothing():
    blocks = make_blocks(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.ones(2, 3).bool(), 6)
    labels = blocks.input_ids.clone()
    labels[1, 2] = -100
    assert losses.targets(labels, is_causal=True).tolist() == [[6, 7, -100], [9, -100, -100]]
    assert torch.equal(losses.targets(labels, is_causal=False), labels)


# --- recipes -------------------------------------------------------------------------------------


def write(tmp_path, values):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_recipe_written_reads_back_the_same(values, tmp_path):
    recipe = load_recipe(write(tmp_path, values), TrainRecipe)
    dump_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml", TrainRecipe) == recipe


def test_an_override_is_the_setting_written_in_the_file(values, tmp_path):
    path = write(tmp_path, values)
    recipe = load_recipe(
        path,
        TrainRecipe,
        ["steps=7", "learning_rate=3e-3", "text.sequence_length=16", "model.num_experts=8"],
    )
    assert (recipe.steps, recipe.learning_rate, recipe.text.sequence_length) == (7, 3e-3, 16)
    assert recipe.model.fields()["num_experts"] == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepps=3", "no setting 'stepps'.*steps, batch_size, accumulate"),
        ("text.sequence_lenght=3", "no setting 'text.sequence_lenght'.*tokens, held_out_tokens"),
        ("tokenizer.vocab=3", "no setting 'tokenizer.vocab'.*vocab_size, folder, sentinels"),
        ("steps=many", "steps = 'many' cannot be"),
        ("steps=0", "steps = 0 cannot be"),
        ("dtype=int8", "'bfloat16', 'float16' or 'float32'"),
        ("tokenizer.folder=there", "either vocab_size"),
        ("steps", "name=value"),
        ("steps.a=1", "not a group"),
    ],
)
def test_a_setting_that_does_not_fit_names_those_there_are(values, tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, values), TrainRecipe, [override])


def test_a_missing_setting_is_named(values, tmp_path):
    del values["steps"]
    with pytest.raises(RecipeError, match="'steps' is missing"):
        load_recipe(write(tmp_path, values), TrainRecipe)


def test_a_text_source_in_a_recipe_is_checked_like_one_on_the_command_line(values, tmp_path):
    values["text"]["train"] = [{"kind": "python", "parts": "code"}]
    with pytest.raises(CalibrationError, match="no setting 'parts'"):
        load_recipe(write(tmp_path, values), TrainRecipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not valid YAML"), ("- a", "a recipe is a mapping"), ("", "a recipe is a mapping")],
)
def test_a_file_that_is_no_recipe_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.yaml", TrainRecipe)
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml", TrainRecipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_mo"}, "qwen3_moe"),
        ({"num_expert": 4}, "num_experts"),
        ({"vocab_size": 10}, "Leave model.vocab_size out"),
        ({"max_position_embeddings": 16}, "max_position_embeddings"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_training(
    values, tmp_path, change, message, run
):
    with pytest.raises(RecipeError, match=message):
        run(values, model={**values["model"], **change})
    assert not list(tmp_path.iterdir())


def test_a_model_without_experts_is_refused_before_training(values, tmp_path, run):
    sizes = {key: value for key, value in MODELS["qwen3_moe"].items() if "expert" not in key}
    del sizes["moe_intermediate_size"]
    with pytest.raises(RecipeError, match="no experts"):
        run(values, model={"model_type": "qwen3", **sizes})
    assert not list(tmp_path.iterdir())


def test_an_encoder_decoder_without_sentinels_is_refused(values, run):
    model = {"model_type": "switch_transformers", **MODELS["switch_transformers"]}
    with pytest.raises(RecipeError, match="Set tokenizer.sentinels"):
        run(values, model=model)


def test_an_output_that_exists_is_left_alone(values, tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(RecipeError, match="exists already"):
        run(values)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_a_training_that_fails_leaves_nothing(values, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(check_recipe(values, TrainRecipe), on_step=stop)
    assert not list(tmp_path.iterdir())
