"""Tasks with several metrics, answers that are generated, texts, examples: files as published."""

import math

import numpy as np
import pytest
import yaml

from asked import preferring, slow_nats
from smelt.errors import RecipeError, SmeltError
from smelt.evaluate import tasks
from smelt.evaluate.aggregates import value
from smelt.evaluate.sandbox import passes
from smelt.evaluate.task_metrics import METRICS, columns_of
from smelt.evaluate.task_written import _pages
from smelt.evaluate.tasks import TASKS, ask_outcomes, evaluate_tasks, read_items
from smelt.text2text import metrics as text2text
from smelt.text2text.files import read_split
from smelt.text2text.items import Answer
from smelt.text2text.tasks import TASKS as BENCHMARKS

FIVE = {"label": list("ABCDE"), "text": ["rain", "a stone", "the sun", "ice", "fog"]}
INTRO = "The following are multiple choice questions (with answers) about high school x.\n\n"
WINOGRAD = (
    "Passage: Ann saw Bo, so *she* hid.\nQuestion: In the passage above, does the pronoun "
    '"*she*" refer to "*Ann*"?\nAnswer:'
)
CHOICES = {
    "arc_challenge": (
        {"question": "What is warm?", "choices": FIVE, "answerKey": "C"},
        [("Question: What is warm?\nAnswer:", f" {text}") for text in FIVE["text"]],
        2,
    ),
    "commonsense_qa": (
        {"question": "What is warm? ", "choices": FIVE, "answerKey": "E"},
        [
            (
                "Question: What is warm?\nA. rain\nB. a stone\nC. the sun\nD. ice\nE. fog\nAnswer:",
                f" {letter}",
            )
            for letter in "ABCDE"
        ],
        4,
    ),
    "mathqa": (
        {"question": "1 + 1 ?", "choices": FIVE, "answerKey": "B"},
        [("Question: 1 + 1 ?\nAnswer:", f" {text}") for text in FIVE["text"]],
        1,
    ),
    "mmlu": (
        {"subject": "high_school_x", "question": "Is it?", "choices": list("wxyz"), "answer": 3},
        [(f"{INTRO}Is it?\nA. w\nB. x\nC. y\nD. z\nAnswer:", f" {letter}") for letter in "ABCD"],
        3,
    ),
    "cb": (
        {"premise": "It is so.", "hypothesis": "it is", "label": "neutral"},
        [
            ("It is so.\nQuestion: it is. True, False, or Neither?\nAnswer:", f" {said}")
            for said in ("True", "False", "Neither")
        ],
        2,
    ),
    "wsc": (
        {
            "text": "Ann saw Bo , so she hid.",
            "target": {
                "span1_index": 0,
                "span1_text": "Ann",
                "span2_index": 5,
                "span2_text": "she",
            },
            "label": True,
        },
        [(WINOGRAD, f" {said}") for said in ("no", "yes")],
        1,
    ),
}
"""Of each task: an item, what the model is asked of it (question, answer), which one is right."""


def passage(*questions, idx=0):
    return {
        "idx": idx,
        "version": 1.1,
        "passage": {
            "text": "All is well.",
            "questions": [
                {
                    "question": f"Why {at}?",
                    "idx": at,
                    "answers": [{"text": t, "idx": 0, "label": label} for t, label in answers],
                }
                for at, answers in enumerate(questions)
            ],
        },
    }


TRUTH = {
    "question": "Is it so?",
    "best_answer": "It is",
    "correct_answers": ["It is", "Yes"],
    "incorrect_answers": ["No", "Never", "Who knows"],
}


def outcomes(model, words, name, **settings):
    return {
        one.metric: one
        for one in ask_outcomes(model, words, read_items([name], **settings))
        if one.task == name
    }


# --- choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_asked_as_documented_and_weighed_as_by_hand(write, llama, words, heard, name):
    row, asked, right = CHOICES[name]
    write(name, [row])
    found = {one.metric: one for one in evaluate_tasks(llama, words, [name]) if one.task == name}
    assert [one[:2] for one in heard] == asked
    nats = [slow_nats(llama, words, *one) for one in asked[:2]]
    assert [one[2] for one in heard[:2]] == pytest.approx(nats, abs=1e-2)
    assert found["acc"].value == (np.argmax([one[2] for one in heard]) == right)
    assert found["acc"].chance == pytest.approx(1 / len(asked))


def test_the_best_answer_stands_elsewhere_in_every_item_and_ties_go_to_no_side(write, spelt):
    of_one_word = {"best_answer": "it", "incorrect_answers": ["was", "good", "bad"]}
    write("truthfulqa_mc1", [TRUTH | of_one_word] * 8)
    (score,) = evaluate_tasks(preferring(), spelt, ["truthfulqa_mc1"])
    assert score.value == score.chance == 0.25
    (items,) = read_items(["truthfulqa_mc1"])
    shown = [items.task.choices(row)[items.task.target(row)] for row in items.rows]
    assert shown == ["it"] * 8


def test_the_share_of_true_answers_is_that_of_their_likelihoods(write, llama, words, heard):
    write("truthfulqa_mc2", [TRUTH])
    (score,) = evaluate_tasks(llama, words, ["truthfulqa_mc2"])
    likelihood = np.exp([one[2] for one in heard])
    assert score.value == pytest.approx(likelihood[:2].sum() / likelihood.sum())
    assert score.chance == pytest.approx(2 / 5)
    assert heard[0][0].endswith("\n\nQ: Is it so?\nA:") and heard[0][0].count("\nQ: ") == 6


# --- several metrics -----------------------------------------------------------------------------


def test_multirc_has_the_metrics_that_text_to_text_has_of_the_same_answers(write, llama, words):
    answers = [("rain", 1), ("it is", 0), ("snow", 1)], [("a", 0), ("bb", 0)], [("x", 1), ("yy", 0)]
    write("multirc", [passage(*answers), passage(*answers[::-1], idx=1)])
    found = outcomes(llama, words, "multirc")
    items = read_split("multirc", "validation").items
    harness = tasks.load_harness()
    (read,) = read_items(["multirc"])
    said = harness.ask(harness.Scorer(llama, words, 8), "multirc", read.task, read.rows, 0).said
    given = [Answer(scores=(0.0, float(2 * what - 1))) for _, what in said["f1"]]
    for one in text2text.measure(BENCHMARKS["multirc"], items, given):
        own = found["acc" if one.metric == "accuracy" else one.metric].score()
        assert own.value == pytest.approx(one.value)
        assert own.n == (14 if own.metric == "acc" else 6)
        assert own.unit == ("items" if own.metric == "acc" else "questions")
    assert found["exact match of questions"].chance == pytest.approx((2 / 8 + 4 / 4) / 6)


def test_saying_yes_to_all_is_seldom_an_exact_match_and_has_a_high_f1(write):
    write("multirc", [passage([("it", 1), ("was", 1), ("good", 0)], [("bad", 1)])])
    found = {
        metric: columns_of(METRICS[metric], TASKS["multirc"], read.rows, said)[0]
        for (read,) in [read_items(["multirc"])]
        for metric in TASKS["multirc"].metrics
        for said in [
            [(row["label"], 1) if "F1" in metric else float(row["label"]) for row in read.rows]
        ]
    }
    assert found["exact match of questions"].tolist() == [[0], [1]]
    assert value("F1", found["F1 of answers"]) == pytest.approx(2 * 3 / (4 + 3))


def test_a_limit_of_grouped_items_keeps_whole_groups(write):
    write("multirc", [passage([("a", 0)] * 3, [("b", 1)] * 2, [("c", 1)] * 4, [("d", 0)])])
    (items,) = read_items(["multirc"], limit=2)
    assert [row["answer"] for row in items.rows] == ["a"] * 3 + ["c"] * 4


def test_macro_f1_and_perplexities_are_those_of_the_harness(write, llama, words, tmp_path):
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.tasks.super_glue.cb.aggregate import cb_multi_fi

    labels = ("entailment", "contradiction", "neutral", "neutral", "entailment")
    rows = [{"premise": f"It {i}", "hypothesis": f"is {i * i}", "label": label} for i, label in
            enumerate(labels)]  # fmt: skip
    write("cb", rows)
    harness = tasks.load_harness()
    (read,) = read_items(["cb"])
    said = harness.ask(harness.Scorer(llama, words, 8), "cb", read.task, read.rows, 0).said["f1"]
    with np.errstate(all="ignore"):
        assert outcomes(llama, words, "cb")["macro F1"].score().value == pytest.approx(
            cb_multi_fi(said)
        )
    folder = tmp_path / "wikitext2_raw"
    folder.mkdir()
    pages = (
        "\n = One = \n \n He was @-@ here . \n \n = = Part = = \n \n More . \n = Two = \n And so"
    )
    (folder / "test.txt").write_text(pages + " on" * 200)
    found = outcomes(llama, words, "wikitext")
    pairs = [tuple(row) for row in found["word_perplexity"].columns]
    assert len(pairs) == 2 and found["word_perplexity"].score().value == pytest.approx(
        weighted_perplexity(pairs)
    )
    of_bytes = [tuple(row) for row in found["bits_per_byte"].columns]
    assert found["bits_per_byte"].score().value == pytest.approx(bits_per_byte(of_bytes))
    running = read_items(["wikitext"])[0].task.target({"page": _pages(pages)[0]["page"]})
    assert "was-here." in running
    slow = slow_nats(llama, words, "", running)
    assert pairs[0][0] == pytest.approx(slow, abs=1e-2)


def test_pages_of_wikitext_make_up_the_text():
    text = "\n = A = \n x\n = = Not a page = = \n y = 1 = z\n = B ( film ) = \n"
    pages = [row["page"] for row in _pages(text)]
    assert len(pages) == 2 and "\n".join(["", *pages]) == text


# --- examples ------------------------------------------------------------------------------------


def test_examples_are_solved_of_the_same_subject_and_come_first(write, llama, words, heard):
    row = CHOICES["mmlu"][0]
    write("mmlu", [row, row | {"subject": "law"}, row | {"question": "Third?"}])
    shown = [
        row | {"subject": subject, "question": f"{subject} {i}?", "answer": i}
        for i in range(3)
        for subject in ("law", "high_school_x")
    ]
    write("mmlu", shown, "train")
    whole, *parts = evaluate_tasks(llama, words, ["mmlu"], shots=2)
    assert whole.harness["shots"] == 2 and "2 solved examples" in whole.source
    first = next(question for question, *_ in heard if "Third?" in question)
    assert first == (
        "The following are multiple choice questions (with answers) about high school x.\n\n"
        "high_school_x 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        "high_school_x 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "Third?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert {one.task: one.n for one in parts} == {"mmlu:high_school_x": 2, "mmlu:law": 1}
    with pytest.raises(RecipeError, match=r"4 examples are asked for, and there are 3"):
        evaluate_tasks(llama, words, ["mmlu"], shots=4)


def test_prompts_have_a_hash_that_the_number_of_examples_changes(write, llama, words):
    write("cb", [CHOICES["cb"][0]] * 3)
    write("cb", [CHOICES["cb"][0] | {"hypothesis": f"{i}"} for i in range(4)], "train")
    none, one, again, other = (
        evaluate_tasks(llama, words, ["cb"], shots=shots, seed=seed)[0].harness["prompts"]
        for shots, seed in ((0, 0), (1, 0), (1, 0), (1, 5))
    )
    assert none != one == again != other


def test_a_task_without_examples_refuses_shots(write):
    write("multirc", [passage([("a", 0)])])
    with pytest.raises(RecipeError, match="multirc has no solved examples"):
        read_items(["multirc"], shots=1)


# --- generated -----------------------------------------------------------------------------------


SUM = {"question": "One and one?", "answer": "It is 1+1=2.\n#### 2"}


def test_generated_answers_are_judged_after_the_harnesss_filters(write, llama, words, monkeypatch):
    write("gsm8k", [SUM, SUM, SUM, SUM])
    harness = tasks.load_harness()
    said = [" so\n#### 2", " 1+1 = 2.", "#### 3", " none"]
    monkeypatch.setattr(harness.Scorer, "generate_until", _saying(said))
    found = {one.metric: one.value for one in evaluate_tasks(llama, words, ["gsm8k"], shots=0)}
    assert found == {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.5}


def _saying(said):
    """A scorer's generation that says so, whatever it is asked."""

    def generate_until(scorer, asked, **_):
        scorer.is_cut = [False] * len(asked)
        return said

    return generate_until


def test_the_settings_of_generated_answers_are_the_harnesss_own():
    from pathlib import Path

    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    own = yaml.safe_load((folder / "gsm8k" / "gsm8k.yaml").read_text())
    harness = tasks.load_harness()
    made = harness.config("gsm8k", TASKS["gsm8k"], [SUM], 5, [SUM] * 5)
    assert made["filter_list"] == own["filter_list"]
    assert made["num_fewshot"] == TASKS["gsm8k"].shots == own["num_fewshot"]
    assert made["metric_list"][0].items() >= own["metric_list"][0].items()
    kept = {key: made["generation_kwargs"][key] for key in own["generation_kwargs"]}
    assert kept == own["generation_kwargs"]


def test_generation_is_greedy_and_ends_at_half_of_the_positions(write, spelt):
    write("gsm8k", [SUM])
    (items,) = read_items(["gsm8k"], shots=0)
    (strict, _) = ask_outcomes(preferring(good=1).eval(), spelt, [items])
    assert strict.source.endswith("answers of at most 32 tokens")  # of 64 positions


# --- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "is_right"),
    [
        ("def f(x):\n    return x + 1", True),
        ("from typing import List\ndef f(x):\n    print('word')\n    return x + 1", True),
        ("def f(x):\n    return x", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("def f(x", False),
        ("import os\nos.fork()\ndef f(x):\n    return x + 1", False),
        ("x = [0] * 10**9\ndef f(x):\n    return x + 1", False),
        ("import os\nassert 'SMELT_DATA' in os.environ\ndef f(x):\n    return x + 1", False),
    ],
    ids=["right", "prints", "wrong", "exits", "ends", "broken", "forks", "memory", "environment"],
)
def test_a_program_passes_if_and_only_if_it_runs_its_tests_to_the_end(program, is_right):
    assert passes(program, "assert f(1) == 2") is is_right


def test_a_program_writes_nothing_outside_its_folder(tmp_path):
    tmp_path.chmod(0o755)
    path = tmp_path / "written"
    passes(f"open({str(path)!r}, 'w').write('x')", "")
    if path.exists():  # its user's own files are as open to it as to any program
        assert path.owner() not in ("root", "nobody")


@pytest.mark.slow
def test_a_program_without_end_is_stopped():
    assert not passes("while True:\n    pass", "")


def test_code_is_executed_only_where_that_is_allowed(write, llama, words, monkeypatch):
    row = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f()"}
    write("humaneval", [row | {"task_id": "0"}] * 3)
    with pytest.raises(RecipeError, match="--execute-code"):
        read_items(["humaneval"])
    said = ["    return 1", "    return 0", "    retur"]
    harness = tasks.load_harness()
    monkeypatch.setattr(harness.Scorer, "generate_until", _saying(said))
    (score,) = evaluate_tasks(llama, words, ["humaneval"], execute_code=True)
    assert score.metric == "pass@1" and score.value == pytest.approx(1 / 3)


# --- mistakes ------------------------------------------------------------------------------------


def test_a_passage_that_is_none_is_named_by_its_line(write):
    write("multirc", [passage([("a", 0)]), {"idx": 1, "passage": {"text": "x"}}])
    with pytest.raises(SmeltError, match=r"line 2: not an item of this task \(KeyError: "):
        read_items(["multirc"])


def test_a_line_that_does_not_parse_is_named_whichever_items_are_asked(write):
    path = write("cb", [CHOICES["cb"][0]] * 9)
    import gzip

    text = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join([*text[:4], "", '{"premise": ', *text[4:]]).encode()))
    with pytest.raises(SmeltError, match=r"validation\.jsonl\.gz, line 6: is no JSON"):
        read_items(["cb"], limit=1)


def test_errors_of_metrics_that_are_no_means_agree_with_resampling():
    from smelt.evaluate.aggregates import AGGREGATES, standard_error

    draws = np.random.default_rng(0)
    so, said = draws.random(800) < 0.4, draws.random(800) < 0.5
    counts = np.stack([so & said, said, so], 1).astype(float)
    texts = np.stack([-draws.gamma(4, 30, 800), draws.integers(20, 60, 800).astype(float)], 1)
    for name, columns in (
        ("F1", counts),
        ("macro F1", np.concatenate([counts, counts[::-1]], 1)),
        ("weighted perplexity", texts),
        ("bits", texts),
        ("perplexity", texts[:, :1] / 100),
    ):
        places = draws.integers(800, size=(2000, 800))
        found = AGGREGATES[name].value(columns[places].sum(1), 800).std()
        assert standard_error(name, columns) == pytest.approx(found, rel=0.08)
    assert standard_error("F1", counts[:1]) is None
    assert math.isclose(standard_error("mean", counts[:, :1]), counts[:, 0].std(ddof=1) / 800**0.5)
