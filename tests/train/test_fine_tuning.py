"""Going on from a checkpoint: on text, or on a benchmark as text to text."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from smelt.checkpoint import mapped
from smelt.errors import RecipeError, SmeltError
from smelt.settings import check_recipe
from smelt.train.trainer import TrainRecipe


class KilledError(Exception):
    """A kill, as near as one process can come to it."""


def kill(step, *_):
    if step == 6:
        raise KilledError


@pytest.fixture(autouse=True)
def _named(files, monkeypatch):
    monkeypatch.setenv("SMELT_DATA", str(files))


@pytest.fixture
def tuning(started, tmp_path):
    """The settings of a fine-tuning run of twelve steps."""
    return {
        "start": str(started),
        "task": {"name": "sst2", "held_out": 8, "max_target": 16},
        "output": str(tmp_path / "tuned"),
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "router_aux_loss": 0.0,
        "dtype": "float32",
        "log_every": 4,
        "evaluate_every": 100,
        "checkpoint_every": 4,
        "keep_checkpoints": 1,
    }


def test_fine_tuning_learns_a_task(tuning, run):
    result = run(tuning, steps=150, learning_rate=1e-2)
    (name,) = result["held_out"]
    assert name.startswith("sst2/validation")
    # below a bit an answer, over its tokens: the label is known
    assert result["held_out"][name]["nats_per_token"] < 0.05
    assert result["task"] == {
        "name": "sst2",
        "trained_on": "sst2/train (subset: 120 of 67,349 records)",
        "examples": 120,
        "examples_with_repeats": 120,
        "share_of_inputs_cut": 0.0,
        "share_of_targets_cut": 0.0,
    }


def test_a_run_begins_with_the_weights_of_its_start(tuning, started, run):
    run(tuning, steps=1, learning_rate=1e-12, warmup_steps=0, weight_decay=0.0)
    before = AutoModelForSeq2SeqLM.from_pretrained(started).state_dict()
    after = AutoModelForSeq2SeqLM.from_pretrained(tuning["output"]).state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    assert AutoTokenizer.from_pretrained(tuning["output"]).get_vocab()


def test_a_killed_run_gives_the_same_bytes(tuning, run, tmp_path):
    values = {**tuning, "model": {"dropout_rate": 0.1}}
    run(values, output=str(tmp_path / "whole"))
    with pytest.raises(KilledError):
        run(values, output=str(tmp_path / "killed"), on_step=kill)
    result = run(values, output=str(tmp_path / "killed"))
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert result == json.loads((tmp_path / "killed" / "smelt" / "training.json").read_text())


def test_fields_of_the_configuration_may_be_changed(tuning, run):
    run(tuning, steps=1, model={"dropout_rate": 0.25})
    config = AutoModelForSeq2SeqLM.from_pretrained(tuning["output"]).config
    assert config.dropout_rate == 0.25
    with pytest.raises(RecipeError, match=r"model\.dropout: .*Did you mean: dropout_rate"):
        run(tuning, model={"dropout": 0.25}, output=tuning["output"] + "2")


@pytest.mark.filterwarnings("ignore:.*calibration tokens reach:UserWarning")
def test_a_mapped_checkpoint_stays_mapped(started, tuning, run, tmp_path):
    """Experts merged in pairs, as smelt stores them."""
    small = tmp_path / "small"
    _merge_pairs(started, small)
    run(tuning, start=str(small), steps=2)
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["model_type"] == "smelt_mapped"
    model = AutoModelForSeq2SeqLM.from_pretrained(tuning["output"])
    stored = [p for name, p in model.named_parameters() if ".experts." in name]
    assert stored
    assert sum(p.numel() for p in stored) == 2 * 2 * 2 * 32 * 48


def _merge_pairs(source, output):
    from smelt import api

    mapped.register()
    api.compress(
        str(source),
        str(output),
        form="mapped",
        method="m-smoe",
        experts=2,
        num_tokens=512,
        sequence_length=32,
        reconstruct=False,
    )


def test_text_may_be_gone_on_with(started, text, run, tmp_path):
    recipe = {
        "start": str(started),
        "text": {
            "train": [str(text / "train.txt")],
            "held_out": [str(text / "held_out.txt")],
            "tokens": 2000,
            "held_out_tokens": 200,
            "sequence_length": 32,
        },
        "spans": {"recurring": 0.3, "cloze": 0.3, "redraw": True},
        "output": str(tmp_path / "on"),
        "steps": 4,
        "batch_size": 4,
        "warmup_steps": 1,
        "dtype": "float32",
    }
    result = run(recipe)
    again = run(recipe, output=str(tmp_path / "again"))
    assert result["held_out"] == again["held_out"]


# --- what does not fit together ------------------------------------------------------------------

BAD = {
    "no text": ({"task": None}, "give either text or task"),
    "no start": ({"start": None}, "tokenizer"),
    "unknown task": ({"task": {"name": "sst3"}}, "the tasks are sst2, mrpc"),
    "a family too": ({"model": {"model_type": "mixtral"}}, "leave model.model_type out"),
    "another tokenizer": ({"tokenizer": {"vocab_size": 300}}, "leave tokenizer out"),
    "short": ({"task": {"name": "sst2", "max_input": 4}}, "max_input"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_are_refused(case, tuning):
    changed, message = BAD[case]
    values = {name: value for name, value in {**tuning, **changed}.items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        check_recipe(values, TrainRecipe)


def test_a_task_from_fresh_weights_is_refused(tuning):
    model = {"model_type": "switch_transformers"}
    values = {**tuning, "model": model, "tokenizer": {"folder": "words"}}
    del values["start"]
    with pytest.raises(RecipeError, match="fine-tunes a checkpoint; name it as start"):
        check_recipe(values, TrainRecipe)


def test_a_causal_model_is_refused(tuning, values_of_a_causal_model, run):
    out = run(values_of_a_causal_model)
    assert out
    with pytest.raises(RecipeError, match="mixtral is no encoder–decoder"):
        run(tuning, start=values_of_a_causal_model["output"])


@pytest.fixture
def values_of_a_causal_model(samoe, tmp_path):
    model = {
        "model_type": "mixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    return {**samoe, "model": model, "output": str(tmp_path / "causal"), "steps": 1}


def test_a_start_that_is_none_is_refused_as_a_start(tuning, tmp_path, run):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SmeltError) as refused:
            run(tuning, start=str(place))
        assert str(place) in str(refused.value) and "tokenizer" not in str(refused.value)


def test_a_start_without_a_tokenizer_is_refused(started, tuning, tmp_path, run):
    """transformers would make one of the family's kind, to which every word is unknown."""
    bare = tmp_path / "bare"
    shutil.copytree(started, bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    with pytest.raises(SmeltError, match="holds no tokenizer"):
        run(tuning, start=str(bare))


def test_another_task_is_not_gone_on_with(tuning, run):
    with pytest.raises(KilledError):
        run(tuning, on_step=kill)
    with pytest.raises(RecipeError, match=r"task\.name was 'sst2' and is 'mrpc'"):
        run(tuning, task={"name": "mrpc", "held_out": 8})
