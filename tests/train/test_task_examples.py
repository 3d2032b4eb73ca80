"""The examples of a benchmark that training takes and holds out."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from smelt.errors import RecipeError
from smelt.settings import check_recipe
from smelt.text.spans import IGNORED
from smelt.text2text.files import is_held_out, read_split
from smelt.train.batches import PaddedRows
from smelt.train.settings import TaskSettings
from smelt.train.task_examples import task_data


@pytest.fixture(autouse=True)
def _named(files, monkeypatch):
    monkeypatch.setenv("SMELT_DATA", str(files))


@pytest.fixture(scope="session")
def model(started):
    return AutoModelForSeq2SeqLM.from_pretrained(started)


@pytest.fixture(scope="session")
def words(started):
    return AutoTokenizer.from_pretrained(started)


def targets(rows, tokenizer):
    batch = rows.__getitems__(range(len(rows)))
    return [
        tokenizer.decode(row[row != IGNORED], skip_special_tokens=True).strip()
        for row in batch["labels"]
    ]


def test_nothing_of_the_reported_split_is_trained_or_held_out(model, words):
    data = task_data(TaskSettings(name="squad"), model, words)
    train = [one for one in read_split("squad", "train").items if not is_held_out(one)]
    assert targets(data.rows, words) == [one.target for one in train]
    (held_out,) = data.held_out
    assert held_out.name.startswith("squad/train")
    assert len(held_out.examples) == sum(map(is_held_out, read_split("squad", "train").items))


def test_invented_questions_take_the_place_of_a_benchmarks_own_in_training_alone(
    model, words, tmp_path
):
    path = tmp_path / "text.txt"
    path.write_text(
        "In 1871 the engineer Mary Hale built a stone bridge over the river Amber, and 3,200 people"
        " cross it every day. The town hall of Port Ellis was opened in 1902 after a great fire"
        " had burnt down the wooden market of the old quarter.\n"
    )
    plain = task_data(TaskSettings(name="squad"), model, words)
    own = {"questions": 20, "paragraphs_of": ["squad"], "text": [str(path)]}
    data = task_data(TaskSettings(name="squad", invented=own), model, words)
    assert len(data.rows) == 20 and data.sha256 != plain.sha256
    assert data.task["trained_on"].startswith("20 invented questions about squad/train (")
    assert [one.name for one in data.held_out] == [one.name for one in plain.held_out]
    assert all(
        torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(data.held_out[0].examples, plain.held_out[0].examples, strict=True)
    )
    assert set(targets(data.rows, words)) & {"1871", "Mary Hale", "1902", "3,200", "Port Ellis"}


def test_text_of_which_no_question_can_be_made_is_refused(model, words, tmp_path):
    (tmp_path / "text.txt").write_text("Short.\n")
    own = {"questions": 20, "text": [str(tmp_path / "text.txt")]}
    with pytest.raises(RecipeError, match="no question can be made"):
        task_data(TaskSettings(name="squad", invented=own), model, words)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"name": "sst2", "invented": {"questions": 5, "paragraphs_of": ["squad"]}}, "squad"),
        ({"name": "squad", "invented": {"questions": 5}}, "paragraphs_of"),
        ({"name": "squad", "invented": {"questions": 5, "paragraphs_of": ["quad"]}}, "'quad'"),
        ({"name": "squad", "invented": {"questions": 0, "paragraphs_of": ["squad"]}}, "questions"),
    ],
)
def test_invented_questions_that_cannot_be_are_refused_by_name(task, said):
    with pytest.raises(RecipeError, match=said):
        check_recipe(task, TaskSettings)


def test_rare_answers_are_repeated_where_balance_is_asked(model, words):
    plain = task_data(TaskSettings(name="wikiqa"), model, words)
    even = task_data(TaskSettings(name="wikiqa", balanced=True), model, words)
    said = targets(even.rows, words)
    assert targets(plain.rows, words).count("yes") < 30
    assert said.count("yes") == pytest.approx(said.count("no"), rel=0.25)
    assert even.task["examples"] == plain.task["examples"] == 120


def test_a_limit_is_drawn_by_its_own_seed(model, words):
    def some(seed):
        task = TaskSettings(name="sst2", limit=20, seed=seed)
        return task_data(task, model, words)

    assert len(some(0).rows) == 20
    assert some(0).sha256 == some(0).sha256 != some(1).sha256


def test_a_batch_is_as_long_as_its_longest_example():
    rows = PaddedRows(
        [{"a": torch.arange(n), "labels": torch.arange(n)} for n in (2, 3, 5)],
        {"a": 9, "labels": IGNORED},
    )
    batch = rows.__getitems__([1, 0, 4])  # 4: the second of the next epoch
    assert batch["a"].tolist() == [[0, 1, 2], [0, 1, 9], [0, 1, 2]]
    assert batch["labels"][1, 2] == IGNORED
    assert np.shape(rows.__getitems__([2])["a"]) == (1, 5)


def test_the_decoder_reads_what_it_has_to_write_one_place_later(model, words):
    rows = task_data(TaskSettings(name="sst2"), model, words).rows
    batch = rows.__getitems__([0, 1])
    start = model.config.decoder_start_token_id
    assert batch["decoder_input_ids"][:, 0].tolist() == [start, start]
    assert (batch["decoder_input_ids"][:, 1:] == batch["labels"][:, :-1]).all()
