"""Laws of fine-tuning an encoder and of the evaluation of a cell."""

import gzip
import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from smelt.errors import RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForMaskedLM
from smelt.study import finetune as module
from smelt.study.evaluate import evaluate_cell
from smelt.study.finetune import finetune, read_items, score
from smelt.study.settings import Evaluation, Finetune
from smelt.text import parse_source
from smelt.train.data import train_tokenizer

GOOD, BAD = "good fine great nice".split(), "bad poor sad dull".split()


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A tiny encoder with its tokenizer, and task files that two words decide."""
    folder = tmp_path_factory.mktemp("ground")
    generator = torch.Generator().manual_seed(0)

    def rows(number):
        for index in range(number):
            label = index % 2
            word = (GOOD if label else BAD)[int(torch.randint(4, (), generator=generator))]
            yield {"sentence": f"the film is {word}", "label": label}

    for split, number in (("train", 256), ("test", 64)):
        path = folder / "data" / "sst2" / f"{split}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows(number))
        path.write_bytes(gzip.compress(lines.encode()))
    (folder / "text.txt").write_text("the film is good bad fine poor great sad nice dull\n" * 20)
    tokenizer = train_tokenizer(
        [parse_source(str(folder / "text.txt"))], vocab_size=300, with_mask=True
    )
    torch.manual_seed(0)
    config = SaMoEConfig.from_preset(
        "paper",
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=2,
        max_position_embeddings=32,
        is_causal=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = SaMoEForMaskedLM(config)
    model.save_pretrained(folder / "run")
    tokenizer.save_pretrained(folder / "run")
    return folder


SETTINGS = Finetune(tasks=("sst2",), epochs=4, batch_size=16, learning_rate=1e-2)


def test_what_two_words_decide_is_learnt_and_the_same_again(ground):
    first = finetune(ground / "run", "sst2", SETTINGS, seed=0, data=ground / "data")
    assert first["accuracy"] > 0.9 and first["f1"] > 0.9
    assert (first["n"], first["chance"], first["training_items"]) == (64, 0.5, 256)
    again = finetune(ground / "run", "sst2", SETTINGS, seed=0, data=ground / "data")
    assert again == first


def test_evaluation_is_written_and_not_done_twice(ground, monkeypatch):
    calls = []

    def stand_in(folder, task, settings, *, seed):
        calls.append((task, seed))
        return {"accuracy": 0.5}

    monkeypatch.setattr(module, "finetune", stand_in)
    evaluation = Evaluation(finetune=Finetune(tasks=("sst2", "rte"), seeds=(0, 1)))
    found = evaluate_cell(ground / "run", evaluation)
    assert calls == [("sst2", 0), ("sst2", 1), ("rte", 0), ("rte", 1)]
    assert list(found["finetune"]) == ["sst2/seed-0", "sst2/seed-1", "rte/seed-0", "rte/seed-1"]
    assert evaluate_cell(ground / "run", evaluation) == found and len(calls) == 4
    assert json.loads((ground / "run.json").read_text()) == found


def test_scores_of_known_guesses():
    found = score([1, 1, 0, 1, 1], [1, 0, 0, 0, 1])
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["f1"] == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert found["majority"] == pytest.approx(0.6)
    assert score([0, 0], [0, 0])["f1"] == 0.0


def test_a_pair_has_a_token_between_and_the_longer_text_is_cut(ground, tmp_path):
    path = tmp_path / "rte" / "validation.jsonl.gz"
    path.parent.mkdir()
    rows = [
        {"premise": "good", "hypothesis": "bad", "label": "not_entailment"},
        {"premise": "the film is good " * 9, "hypothesis": "bad", "label": "entailment"},
        {"premise": "bad", "hypothesis": "the film is good " * 9, "label": "entailment"},
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ground / "run")
    found = read_items("rte", "validation", tokenizer, 8, tmp_path)
    end = tokenizer.eos_token_id
    good, bad = (tokenizer.encode(word, add_special_tokens=False) for word in ("good", "bad"))
    assert found.ids[0] == [*good, end, *bad]
    film = tokenizer.encode("the film is good " * 9, add_special_tokens=False)[: 7 - len(bad)]
    assert found.ids[1] == [*film, end, *bad] and found.ids[2] == [*bad, end, *film]
    assert (found.labels, found.num_cut) == ([1, 0, 0], 2)


def test_an_unknown_task_names_those_there_are(ground):
    with pytest.raises(RecipeError, match="no task 'cola'. The tasks: sst2, mrpc, rte"):
        finetune(ground / "run", "cola", SETTINGS, seed=0, data=ground / "data")


def test_a_missing_file_is_named(ground):
    with pytest.raises(RecipeError, match="mrpc/train.jsonl.gz"):
        finetune(ground / "run", "mrpc", SETTINGS, seed=0, data=ground / "data")


@pytest.mark.data
@pytest.mark.parametrize("name", module.TASKS)
def test_the_files_of_every_task_are_read(ground, name):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ground / "run")
    for split in ("train", module.TASKS[name].split):
        found = read_items(name, split, tokenizer, 64, limit=50)
        assert set(found.labels) == {0, 1} and len(found.ids) == 50
        assert max(map(len, found.ids)) <= 64
