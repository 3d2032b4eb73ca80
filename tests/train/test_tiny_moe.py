"""What the embedded checkpoint promises: small, trained, its experts in use, and made as stated."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smelt.settings import load_recipe
from smelt.text import parse_source, tokenize
from smelt.train.data import next_token_examples
from smelt.train.measure import HeldOut, label_counts, report
from smelt.train.settings import TrainRecipe

FOLDER = Path(str(files("smelt") / "data" / "tiny-moe"))
RECIPE = Path(__file__).parents[2] / "recipes" / "train" / "tiny-moe.yaml"


def blocks_of(word, tokenizer, num_tokens):
    return tokenize(
        [parse_source(word)], tokenizer, num_tokens=num_tokens, sequence_length=256, seed=0
    )


def test_it_is_at_most_ten_megabytes_with_all_it_needs():
    total = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert total <= 10_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in FOLDER.iterdir()
    }


def test_it_says_what_made_it():
    saved = load_recipe(FOLDER / "smelt" / "recipe.yaml", TrainRecipe)
    assert saved == load_recipe(RECIPE, TrainRecipe)


@pytest.mark.parametrize("part", ["code", "prose"])
def test_it_predicts_held_out_text_and_uses_its_experts(part):
    # Measured anew, on whatever Python's library this is; the train tokens are a sample.
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    train = next_token_examples(blocks_of(f"python:train:{part}", tokenizer, 50_000))
    blocks = blocks_of(f"python:held-out:{part}", tokenizer, 8192)
    held_out = HeldOut(part, next_token_examples(blocks), blocks)
    counts = label_counts(train, model.config.vocab_size)
    result = report(model, counts, [held_out], batch_size=8)
    assert result["held_out"][part]["share_of_unigram"] < 0.6
    assert min(result["routing_entropy_share_of_uniform"]) > 0.8


def test_the_figures_it_states_keep_the_promise():
    stated = json.loads((FOLDER / "smelt" / "training.json").read_text(encoding="utf-8"))
    assert all(source["share_of_unigram"] < 0.6 for source in stated["held_out"].values())
    assert min(stated["routing_entropy_share_of_uniform"]) > 0.8
