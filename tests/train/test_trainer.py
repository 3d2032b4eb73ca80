"""Laws of training: what is learnt, what is saved, what is refused before the first batch."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from smelt.errors import CalibrationError, RecipeError
from smelt.settings import check_recipe, dump_recipe, load_recipe
from smelt.text import parse_source, tokenize
from smelt.train import measure, step
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
