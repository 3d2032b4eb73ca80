"""Zero-shot tasks: the harness's scores on local items, equal to slow sums of log-probabilities."""

import gzip
import json
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import smelt.evaluate
from asked import preferring, random_llama, slow_nats
from checkpoints import save
from commands import make_source
from commands import smelt as run_smelt
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.errors import CheckpointError, RecipeError, SmeltError
from smelt.evaluate import task_table, tasks
from smelt.evaluate.tasks import TASKS, evaluate_tasks, read_items

ARC = {"label": ["A", "B", "C"], "text": ["rain", "a stone", "the sun"]}
EXAMPLES = {
    "blimp": (
        {"UID": "u", "field": "syntax", "sentence_good": "A dog ran.", "sentence_bad": "A dog ?"},
        [("", " A dog ran."), ("", " A dog ?")],
        0,
    ),
    "lambada": ({"text": 'He said: "Go\nto bed"'}, [('He said: "Go\nto', ' bed"')], None),
    "hellaswag": (
        {"activity_label": "Skiing", "ctx": "A man. he", "endings": ["falls.", "sits"], "label": 1},
        [("Skiing: A man. he", " falls."), ("Skiing: A man. he", " sits")],
        1,
    ),
    "arc_easy": (
        {"question": "What is warm?", "choices": ARC, "answerKey": "C"},
        [("Question: What is warm?\nAnswer:", f" {text}") for text in ARC["text"]],
        2,
    ),
    "piqa": (
        {"goal": "open a jar", "sol1": "twist", "sol2": "shout at it", "label": 0},
        [("Question: open a jar\nAnswer:", f" {text}") for text in ("twist", "shout at it")],
        0,
    ),
    "winogrande": (
        {"sentence": "Ann saw Bo, so _ hid.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        [("Ann saw Bo, so Ann", " hid."), ("Ann saw Bo, so Bo", " hid.")],
        1,
    ),
    "copa": (
        {
            "premise": "The man fell.",
            "choice1": "He ran.",
            "choice2": "I pushed.",
            "question": "cause",
            "label": 1,
        },
        [("The man fell because", " he ran."), ("The man fell because", " I pushed.")],
        1,
    ),
    "openbookqa": (
        {"question_stem": "What is warm is", "choices": ARC, "answerKey": "A"},
        [("What is warm is", f" {text}") for text in ARC["text"]],
        0,
    ),
    "boolq": (
        {"passage": "It is so.", "question": "is it so", "label": True},
        [("It is so.\nQuestion: is it so?\nAnswer:", f" {text}") for text in ("no", "yes")],
        1,
    ),
    "sst2": (
        {"sentence": "a fine film ", "label": 1},
        [("Review: a fine film\nSentiment:", f" {text}") for text in ("negative", "positive")],
        1,
    ),
    "rte": (
        {"premise": "All is well.", "hypothesis": "It is.", "label": "not_entailment"},
        [
            ("All is well.\nQuestion: It is. True or False?\nAnswer:", f" {text}")
            for text in ("True", "False")
        ],
        1,
    ),
}
"""Of each task: an item, what the model is asked of it (question, answer), which one is right."""


# --- ground --------------------------------------------------------------------------------------


def pairs(num, fields=("syntax", "morphology", "syntax/semantics")):
    return [
        {
            "UID": f"u{i}",
            "field": fields[i % len(fields)],
            "sentence_good": "it was good",
            "sentence_bad": "it was bad",
        }
        for i in range(num)
    ]


def score(model, words, name, **settings):
    """The first score of a task."""
    return evaluate_tasks(model, words, [name], **settings)[0]


# --- laws ----------------------------------------------------------------------------------------


def test_a_model_that_prefers_the_good_sentence_is_always_right(write, spelt):
    write("blimp", pairs(7))
    assert score(preferring(good=1), spelt, "blimp").value == 1
    assert score(preferring(good=1), spelt, "blimp").standard_error == 0
    assert score(preferring(bad=1), spelt, "blimp").value == 0


def test_a_model_that_tells_nothing_apart_is_right_as_often_as_chance(write, spelt):
    write("blimp", pairs(8))
    found = score(preferring(), spelt, "blimp")
    assert found.value == found.chance == 0.5


def test_the_last_word_is_right_where_it_is_the_likeliest(write, spelt):
    write("lambada", [{"text": "it was good"}, {"text": "good was bad"}])
    acc, perplexity = evaluate_tasks(preferring(good=1), spelt, ["lambada"])
    likelihood = torch.tensor([0, 0, 0, 0, 1.0, 0]).log_softmax(0)[4:]
    assert acc.value == 0.5 and acc.chance is None
    assert perplexity.value == pytest.approx(float((-likelihood.mean()).exp()))
    assert perplexity.standard_error == pytest.approx(
        float(likelihood.std() / 2**0.5) * perplexity.value
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_items_are_asked_as_documented_and_weighed_as_by_hand(write, llama, words, heard, name):
    row, asked, right = EXAMPLES[name]
    write(name, [row])
    found = {one.metric: one for one in evaluate_tasks(llama, words, [name])}
    assert [one[:2] for one in heard] == asked
    nats = [slow_nats(llama, words, *one) for one in asked]
    assert [one[2] for one in heard] == pytest.approx(nats, abs=1e-3)
    if right is None:
        assert found["perplexity"].value == pytest.approx(np.exp(-nats[0]), rel=1e-3)
        return
    assert found["acc"].value == (np.argmax(nats) == right)
    assert found["acc"].chance == pytest.approx(1 / len(asked))
    if "acc_norm" in found:
        by_character = [n / (len(answer) - 1) for n, (_, answer) in zip(nats, asked, strict=True)]
        assert found["acc_norm"].value == (np.argmax(by_character) == right)


@pytest.mark.parametrize("name", ["blimp", "hellaswag", "winogrande"])
def test_scores_and_errors_are_those_of_the_harness_itself(write, llama, words, name):
    from lm_eval.evaluator import evaluate

    harness = tasks.load_harness()
    row = EXAMPLES[name][0]
    text = {key for key, value in row.items() if isinstance(value, str) and key != "answer"}
    rows = [row | {key: f"{row[key]} {i * 7 % 11}" for key in text} for i in range(9)]
    if name == "winogrande":
        rows = [r | {"sentence": f"{r['sentence']} {r['option1']}"} for r in rows]
    write(name, rows)
    (items,) = read_items([name])
    own = {one.metric: one for one in evaluate_tasks(llama, words, [name]) if one.task == name}
    with harness.quiet():
        made = harness.ConfigurableTask(config=harness.config(name, items.task, items.rows))
        its = evaluate(harness.Scorer(llama, words, 4), {name: made})["results"][name]
    for metric, one in own.items():
        assert one.value == pytest.approx(its[f"{metric},none"])
        assert one.standard_error == pytest.approx(its[f"{metric}_stderr,none"])


def test_the_parts_of_a_task_make_up_the_whole(write, llama, words):
    fields = ("syntax", "morphology", "syntax/semantics", "syntax_semantics")
    rows = [
        one | {"sentence_good": f"{i} is {i * i}", "sentence_bad": f"{i * i} is {i}"}
        for i, one in enumerate(pairs(13, fields))
    ]
    write("blimp", rows)
    whole, *parts = evaluate_tasks(llama, words, ["blimp"])
    assert [one.task for one in parts] == [
        "blimp:syntax",
        "blimp:morphology",
        "blimp:syntax_semantics",
    ]
    assert sum(one.n for one in parts) == whole.n == 13
    assert sum(one.n * one.value for one in parts) == pytest.approx(whole.n * whole.value)


def test_batches_and_company_change_nothing(write, llama, words):
    for name in ("blimp", "arc_easy"):
        row = EXAMPLES[name][0]
        key = "sentence_good" if name == "blimp" else "question"
        write(name, [row | {key: f"{row[key]} {i} " * (1 + i % 4)} for i in range(9)])
    both = evaluate_tasks(llama, words, ["blimp", "arc_easy", "blimp"], batch_size=1)
    alone = [one for name in ("blimp", "arc_easy") for one in evaluate_tasks(llama, words, [name])]
    assert both == alone


def test_model_and_tokenizer_are_left_as_they_were(write, spelt):
    write("blimp", pairs(2))
    model = preferring(good=1).train()
    evaluate_tasks(model, spelt, ["blimp"])
    assert model.training and model.config.use_cache is True
    assert spelt.pad_token is None


def test_progress_ends_at_the_last_request(write, spelt):
    write("blimp", pairs(5))
    told = []
    score(preferring(), spelt, "blimp", progress=lambda *step: told.append(step), batch_size=2)
    assert told[-1] == ("blimp", 10, 10)
    assert [step[1] for step in told] == sorted(step[1] for step in told)


# --- subsets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "size"), [(1, 10), (3, 10), (7, 10), (10, 10), (99, 10)])
def test_a_limit_is_spread_evenly_over_the_file(write, limit, size):
    write("lambada", [{"text": f"number {i}"} for i in range(size)])
    (items,) = read_items(["lambada"], limit=limit)
    chosen = [int(row["text"].split()[1]) for row in items.rows]
    assert len(chosen) == min(limit, size) and chosen[0] == 0
    gaps = {b - a for a, b in pairwise([*chosen, size])}
    assert max(gaps) - min(gaps) <= 1


def test_a_small_subset_has_items_of_every_paradigm(write):
    write("blimp", [one | {"field": f"f{i // 6}"} for i, one in enumerate(pairs(24))])
    (items,) = read_items(["blimp"], limit=8)
    assert Counter(row["field"] for row in items.rows) == {f"f{i}": 2 for i in range(4)}


def test_a_subset_is_named_and_the_whole_is_not(write, spelt, monkeypatch):
    write("lambada", [{"text": f"it was {word}"} for word in ("good", "bad", "it", "was")])
    monkeypatch.setitem(task_table.TASKS, "lambada", replace(TASKS["lambada"], published=4))
    whole, part = (score(preferring(), spelt, "lambada", limit=limit) for limit in (None, 3))
    assert whole.source == "lambada/test"
    assert part.source == "lambada/test (subset: 3 of 4 items)" and part.n == 3
    assert part.sha256 != whole.sha256


def test_one_item_has_no_error(write, spelt):
    write("lambada", [{"text": "it was good"}] * 2)
    assert score(preferring(), spelt, "lambada", limit=1).standard_error is None


# --- short models --------------------------------------------------------------------------------


def test_what_is_too_long_loses_its_beginning_and_is_counted(write, words, heard):
    short = random_llama(16)
    texts = ["a b", "one two three four five six seven eight nine ten", "c d"]
    write("lambada", [{"text": text} for text in texts])
    found = score(short, words, "lambada")
    assert found.num_cut == 1
    slow = [slow_nats(short, words, *one[:2]) for one in heard]
    assert [one[2] for one in heard] == pytest.approx(slow, abs=1e-3)


def test_the_last_token_needs_no_position(write, spelt):
    write("lambada", [{"text": "it " * num + "good"} for num in (64, 65)])  # 65 and 66 tokens
    assert score(preferring(), spelt, "lambada").num_cut == 1  # of 64 positions


@pytest.mark.parametrize("length", [9, 16, 17, 24, 30])
def test_an_answer_longer_than_the_model_is_weighed_in_windows(write, words, heard, length):
    short = random_llama(8)
    write("piqa", [{"goal": "g", "sol1": "x", "sol2": "y" * length, "label": 0}])
    assert score(short, words, "piqa").num_cut == 1
    slow = [slow_nats(short, words, *one[:2]) for one in heard]
    assert [one[2] for one in heard] == pytest.approx(slow, abs=1e-3)


# --- mistakes ------------------------------------------------------------------------------------


def test_unknown_tasks_and_limits_are_refused(write):
    write("copa", [EXAMPLES["copa"][0]])
    with pytest.raises(RecipeError, match=r"no task 'hans'\. The tasks are: blimp, hellaswag"):
        read_items(["copa", "hans"])
    with pytest.raises(RecipeError, match="no task is named"):
        read_items([])
    with pytest.raises(RecipeError, match="limit = 0"):
        read_items(["copa"], limit=0)


def test_data_that_is_not_there_is_named(write, tmp_path, monkeypatch):
    with pytest.raises(SmeltError, match=r"copa/validation\.jsonl\.gz: there is no such file"):
        read_items(["copa"], data=tmp_path)
    with pytest.raises(RecipeError, match="elsewhere: there is no such folder"):
        read_items(["copa"], data=tmp_path / "elsewhere")
    monkeypatch.delenv("SMELT_DATA")
    with pytest.raises(RecipeError, match="Set SMELT_DATA"):
        read_items(["copa"])


COPA = EXAMPLES["copa"][0]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "holds no item"),
        (["{"], "line 1: is no JSON"),
        (["[]"], "line 1: .* is no record"),
        ([json.dumps(COPA), json.dumps({"premise": "x"})], "line 2: .*KeyError: 'choice1'"),
        ([json.dumps(COPA | {"question": "why"})], "line 1: .*KeyError: 'why'"),
        ([json.dumps(COPA | {"label": 2})], "answer 2 of 2 choices"),
        ([json.dumps(COPA | {"label": -1})], "answer -1 of 2 choices"),
    ],
)
def test_a_file_of_something_else_is_refused(write, lines, words):
    path = write("copa", [])
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(SmeltError, match=words):
        read_items(["copa"])


@pytest.mark.parametrize(
    "content",
    [b"plain", gzip.compress(b"x" * 9999)[:-9], gzip.compress(b"\xff")],
    ids=["no gzip", "cut short", "not UTF-8"],  # the bytes hold the time, and differ by process
)
def test_a_damaged_file_is_refused(write, content):
    write("copa", []).write_bytes(content)
    with pytest.raises(SmeltError, match="cannot be read"):
        read_items(["copa"])


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "smelt.evaluate.task_harness", raising=False)
    monkeypatch.delattr(smelt.evaluate, "task_harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    with pytest.raises(SmeltError, match=r"pip install 'smelt\[eval\]'"):
        read_items(["copa"])


def test_models_that_cannot_be_asked_are_refused(write, words, spelt):
    write("blimp", pairs(2))
    two_sided = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(CheckpointError, match="not a causal language model"):
        score(two_sided, spelt, "blimp")
    with pytest.raises(CheckpointError, match="the model has 6 tokens"):
        score(preferring(), words, "blimp")
    with pytest.raises(CheckpointError, match="outputs are NaN"):
        score(preferring(good=float("nan")), spelt, "blimp")
    spelt.eos_token = None
    with pytest.raises(CheckpointError, match="neither a token to begin"):
        score(preferring(), spelt, "blimp")


# --- checkpoints and the command line ------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_a_checkpoint_in_memory_is_what_transformers_loads(tmp_path, family):
    folder = save(family, tmp_path)
    ids = torch.randint(3, 90, (2, 9))
    own, theirs = load_model(Checkpoint.open(folder)), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(own(ids).logits, theirs(ids).logits)
    weights = [m.get_input_embeddings().weight is m.lm_head.weight for m in (own, theirs)]
    assert weights == [family == "qwen3_moe"] * 2  # tied in memory, not twice


def test_evaluate_asks_tasks_of_every_checkpoint_and_records_them(write, tmp_path):
    write("blimp", pairs(6))
    sources = [make_source(tmp_path / name / "x", seed=i) for i, name in enumerate("ab")]
    said = run_smelt("evaluate", *sources, "--tasks", "blimp", "--limit", 5, "--json")
    assert said.code == 0, said.err
    assert not said.json["checkpoints"]  # no text was named, so none was measured
    results = said.json["results"]
    assert Counter(one["task"] for one in results)["blimp"] == 2
    first = results[0]
    assert (first["metric"], first["n"], first["chance"]) == ("acc", 5, 0.5)
    assert first["text"] == ["blimp/test (subset: 5 of 67,000 items)"]
    assert "lm_eval" in first["versions"]
    table = run_smelt("evaluate", *sources, "--tasks", "blimp").out
    assert all(str(source) in table for source in sources) and "- blimp/test (subset: 6" in table


def test_tasks_and_a_text_are_measured_together(write, tmp_path):
    write("copa", [COPA] * 3)
    words = ("--tasks", "copa", "--tokens", 100, "--set", "sequence_length=32", "--json")
    said = run_smelt("evaluate", make_source(tmp_path / "x"), *words)
    assert said.code == 0, said.err
    assert "nats per token" in said.json["checkpoints"][0]
    assert {"perplexity", "copa"} == {one["task"] for one in said.json["results"]}
    assert run_smelt("evaluate", tmp_path / "x", "--tasks", "hans").code == 2


# --- the real thing ------------------------------------------------------------------------------


@pytest.mark.data
def test_twenty_real_pairs_are_asked(smelt_data, llama, words, heard):
    whole, *parts = evaluate_tasks(llama, words, ["blimp"], limit=20, data=smelt_data)
    assert whole.n == 20 and len(parts) >= 3
    assert whole.source == "blimp/test (subset: 20 of 67,000 items)"
    slow = [slow_nats(llama, words, *one[:2]) for one in heard[:6]]
    assert [one[2] for one in heard[:6]] == pytest.approx(slow, abs=1e-3)


FEWER = {"blimp": 4020, "mmlu": 2280, "mathqa": 2983}
"""Items of files that are subsets."""


@pytest.mark.data
@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_real_file(smelt_data, name):
    (items,) = read_items([name], data=smelt_data, execute_code=True)
    assert len(items.rows) == FEWER.get(name, TASKS[name].published)
