"""Benchmarks asked of an encoder–decoder: scored choices, generated answers, named records."""

import json
import math

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from benchmarks import write_tasks
from checkpoints import random_model, save, tiny_config
from smelt import api
from smelt.checkpoint.source import Checkpoint
from smelt.cli.app import app
from smelt.errors import CheckpointError, RecipeError
from smelt.evaluate.results import load
from smelt.evaluate.text2text import ask_benchmark, read_benchmarks
from smelt.text import parse_source
from smelt.text2text.encode import Encoder
from smelt.text2text.metrics import measure
from smelt.text2text.tasks import TASKS
from smelt.train.data import train_tokenizer


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def _named(files, monkeypatch):
    monkeypatch.setenv("SMELT_DATA", str(files))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("the house is painted red, question: answer: context: sentence: yes no\n" * 40)
    return train_tokenizer([parse_source(str(path))], vocab_size=420, num_sentinels=8)


@pytest.fixture(scope="session")
def model(tokenizer):
    """Random, and with enough capacity that no token is dropped."""
    config = tiny_config(
        "switch_transformers", vocab_size=len(tokenizer), expert_capacity=1000, dropout_rate=0.1
    )
    config.eos_token_id = tokenizer.eos_token_id
    model = random_model(config)
    model.generation_config.max_length = None
    return model


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    """The same as a checkpoint."""
    out = tmp_path_factory.mktemp("checkpoint") / "switch"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def asked(task, **options):
    (found,) = read_benchmarks([task], **options)
    return found


@torch.no_grad()
def slow_score(model, encoder, item, ids):
    """The log-probability of a choice, one forward for each of its tokens, nothing padded."""
    (read,) = encoder.encode([item], for_training=False)
    written, total = [model.config.decoder_start_token_id], 0.0
    for token in ids:
        logits = model(
            input_ids=torch.tensor([read.input_ids]),
            decoder_input_ids=torch.tensor([written]),
            use_cache=False,
        ).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        written.append(token)
    return total


@torch.no_grad()
def slow_answer(model, encoder, item):
    """Greedy, without a cache, one item at a time."""
    (read,) = encoder.encode([item], for_training=False)
    written = [model.config.decoder_start_token_id, *encoder.mark]
    for _ in range(encoder.max_target - len(encoder.mark)):
        logits = model(
            input_ids=torch.tensor([read.input_ids]),
            decoder_input_ids=torch.tensor([written]),
            use_cache=False,
        ).logits[0, -1]
        written.append(int(logits.argmax()))
        if written[-1] == encoder.end:
            break
    return encoder.text(written[1 + len(encoder.mark) :])


@pytest.mark.parametrize("task", ["sst2", "winogrande", "multirc"])
def test_a_choice_has_the_probability_of_its_tokens(task, model, tokenizer):
    one = asked(task)
    found = ask_benchmark(model, tokenizer, one, batch_size=4)
    own = TASKS[task]
    encoder = Encoder(tokenizer, max_input=own.max_input, max_target=own.max_target)
    for item, answer in list(zip(one.items.items, found.answers, strict=True))[:4]:
        slow = [slow_score(model, encoder, item, ids) for ids in encoder.choices(item)]
        assert answer.scores == pytest.approx(slow, abs=1e-3)


@pytest.mark.parametrize("task", ["squad", "hotpotqa"])
def test_an_answer_is_what_the_model_writes_by_itself(task, model, tokenizer):
    one = asked(task, limit=6)
    found = ask_benchmark(model, tokenizer, one, batch_size=4)
    own = TASKS[task]
    encoder = Encoder(tokenizer, max_input=own.max_input, max_target=own.max_target)
    slow = [slow_answer(model, encoder, item) for item in one.items.items]
    assert [answer.text for answer in found.answers] == slow
    assert all(slow)


@pytest.mark.parametrize("task", ["mrpc", "squad"])
def test_answers_do_not_depend_on_the_batch_size(task, model, tokenizer):
    one = asked(task)
    whole = ask_benchmark(model, tokenizer, one, batch_size=18)
    single = ask_benchmark(model, tokenizer, one, batch_size=1)
    for a, b in zip(whole.answers, single.answers, strict=True):
        assert a.text == b.text
        assert a.scores == pytest.approx(b.scores, abs=1e-3)


def test_the_reference_answer_is_not_read(model, tokenizer, files):
    """Other labels change the score and no answer."""
    one = asked("sst2")
    found = ask_benchmark(model, tokenizer, one)
    from dataclasses import replace

    turned = tuple(
        replace(item, label=1 - item.label, target=item.choices[1 - item.label])
        for item in one.items.items
    )
    other = ask_benchmark(model, tokenizer, replace(one, items=replace(one.items, items=turned)))
    assert other.answers == found.answers
    assert other.scores[0].value == pytest.approx(1 - found.scores[0].value)


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    first = ask_benchmark(model, tokenizer, asked("sst2"))
    assert model.training
    model.eval()
    assert ask_benchmark(model, tokenizer, asked("sst2")).answers == first.answers  # no dropout
    assert not model.training


def test_records_are_named_and_repeatable(folder):
    found = api.evaluate(str(folder), benchmarks=["wikiqa", "mrpc"])
    assert not found.compared
    names = {(one.task, one.metric): one for one in found.results}
    assert {metric for task, metric in names if task == "wikiqa"} == {
        "MAP",
        "MRR",
        "MAP, all questions",
        "accuracy",
    }
    one = names["wikiqa", "MAP"]
    assert one.n == 4  # of six questions, two have no answer
    assert one.chance == 1.0  # shared words find it
    assert 0 < one.value <= 1
    assert one.standard_error is not None
    assert one.text == ("wikiqa/test (subset: 18 of 6,165 records)",)
    again = api.evaluate(str(folder), benchmarks=["wikiqa", "mrpc"])
    assert [r.value for r in again.results] == [r.value for r in found.results]


def test_every_task_is_measured_with_every_metric(folder):
    found = api.evaluate(str(folder), benchmarks=list(TASKS), limit=3)
    for one in found.benchmarks[folder.name]:
        assert [s.metric for s in one.scores] == list(one.levels)
        assert all(s.n > 0 for s in one.scores)
        (items,) = [a.items.items for a in read_benchmarks([one.task], limit=3)]
        assert measure(TASKS[one.task], items, one.answers) == list(one.measured)


def test_the_part_to_choose_on_is_not_the_one_that_is_reported(folder):
    for task in ("sst2", "squad"):
        parts = [
            api.evaluate(str(folder), benchmarks=[task], part=part).benchmarks[folder.name][0]
            for part in ("report", "choose")
        ]
        assert not {*parts[0].names} & {*parts[1].names}


@pytest.mark.filterwarnings("ignore:.*calibration tokens reach:UserWarning")
def test_a_mapped_checkpoint_is_asked_as_its_original(folder, tmp_path):
    """Every expert kept: the same model in another form."""
    small = tmp_path / "mapped"
    settings = {"form": "mapped", "keep": 1.0, "num_tokens": 2048, "sequence_length": 64}
    api.compress(str(folder), str(small), **settings, reconstruct=False)
    assert Checkpoint.open(small).config.model_type == "smelt_mapped"
    found = api.evaluate([str(folder), str(small)], benchmarks=["sst2", "squad"], limit=6)
    first, second = found.benchmarks.values()
    for a, b in zip(first, second, strict=True):
        assert [x.text for x in a.answers] == [x.text for x in b.answers]
        for x, y in zip(a.answers, b.answers, strict=True):
            assert x.scores == pytest.approx(y.scores, abs=1e-4)


def test_the_command_saves_records_and_outcomes(folder, tmp_path):
    words = ["evaluate", str(folder), "--benchmarks", "sst2,squad", "--limit", "5"]
    paths = [tmp_path / "records.json", tmp_path / "outcomes.json"]
    done = CliRunner().invoke(
        app,
        [*words, "--output", str(paths[0]), "--outcomes", str(paths[1])],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    assert "majority of training" in done.output
    records = load(paths[0])
    assert [(one.task, one.metric) for one in records] == [
        ("sst2", "accuracy"),
        ("squad", "F1"),
        ("squad", "EM"),
    ]
    saved = json.loads(paths[1].read_text())["checkpoints"][folder.name]
    values = saved["squad"]["metrics"]["F1"]["values"]
    assert len(values) == len(saved["squad"]["answers"]) == 5
    assert math.fsum(values.values()) / 5 == pytest.approx(records[1].value)
    assert all(isinstance(text, str) for text in saved["squad"]["answers"].values())
    assert all(len(scores) == 2 for scores in saved["sst2"]["answers"].values())


def test_the_command_cuts_inputs_to_what_is_asked(folder):
    """As many tokens as a model was fine-tuned with may be fewer than the benchmark's own."""

    def is_cut(*words):
        command = ["evaluate", str(folder), "--benchmarks", "squad", "--limit", "5"]
        done = CliRunner().invoke(app, [*command, *words])
        assert done.exit_code == 0, done.output
        return "100.0% of the inputs cut" in done.output

    assert not is_cut()
    assert is_cut("--max-input", "24")
    refused = CliRunner().invoke(app, ["evaluate", str(folder), "--max-input", "8"])
    assert refused.exit_code == 2


# --- what cannot be asked ------------------------------------------------------------------------


def test_a_causal_model_is_refused(tmp_path):
    source = save("mixtral", tmp_path / "mixtral")
    with pytest.raises(CheckpointError, match="no encoder–decoder language model.*--tasks"):
        api.evaluate(str(source), benchmarks=["sst2"])


def test_a_model_that_cannot_begin_is_refused(folder, tmp_path, tokenizer):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    model.config.decoder_start_token_id = None
    with pytest.raises(CheckpointError, match="no decoder_start_token_id"):
        ask_benchmark(model, tokenizer, asked("sst2"))


def test_outputs_that_are_no_numbers_are_refused(folder, tokenizer):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    model.shared.weight.data[5] = math.nan
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        ask_benchmark(model, tokenizer, asked("sst2"))


def test_an_unknown_benchmark_is_refused(folder):
    with pytest.raises(RecipeError, match="no task 'blimp'. The tasks are: sst2"):
        api.evaluate(str(folder), benchmarks=["blimp"])
