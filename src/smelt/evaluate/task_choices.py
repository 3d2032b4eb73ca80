"""Tasks with answers to choose from: the likelihood of each after the question."""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smelt.evaluate.task_kinds import Row, Task


def _pair(row: Row) -> list[str]:
    """The two sentences of BLiMP; the good one stands first in every other pair.

    The harness takes the first of two equal scores. Where the good one is always first, a model
    that tells nothing apart is right every time.
    """
    pair = [row["sentence_good"], row["sentence_bad"]]
    return pair if _good(row) == 0 else pair[::-1]


def _good(row: Row) -> int:
    return int(row["place"]) % 2


def _beginnings(row: Row) -> list[str]:
    begin = str(row["sentence"]).partition("_")[0]
    return [begin + row["option1"], begin + row["option2"]]


def _end(row: Row) -> str:
    return str(row["sentence"]).partition("_")[2].strip()


def _lettered(row: Row) -> int:
    """The place of the right answer among those that carry letters."""
    return int(row["choices"]["label"].index(row["answerKey"]))


LETTERS = ("A", "B", "C", "D", "E")


def _listed(question: str, choices: list[str], num: int) -> str:
    """A question, its choices behind letters, and where the letter of the right one goes."""
    lines = [f"{letter}. {choices[i]}" for i, letter in enumerate(LETTERS[:num])]
    return "\n".join([question.strip(), *lines, "Answer:"])


def _subject(row: Row) -> str:
    return str(row["subject"])


@functools.cache
def _own_prompt(file: str) -> str:
    """The prompt of one of the harness's own tasks, a template, from where it is installed."""
    import yaml

    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "read_items looks for the harness first"
    text = (Path(spec.origin).parent / "tasks" / file).read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return str(found["doc_to_text"])


def _after_examples(row: Row) -> str:
    """TruthfulQA's question after the six questions and answers that the harness shows."""
    from lm_eval.utils import apply_template

    return str(apply_template(_own_prompt("truthfulqa/truthfulqa_mc1.yaml"), row))


def _best(row: Row) -> int:
    """Where the best answer stands: at another place in each item, so that ties go to no side."""
    return int(row["place"]) % (1 + len(row["incorrect_answers"]))


def _one_right(row: Row) -> list[str]:
    wrong, at = list(row["incorrect_answers"]), _best(row)
    return [*wrong[:at], row["best_answer"], *wrong[at:]]


def _many_right(row: Row) -> list[str]:
    return [*row["correct_answers"], *row["incorrect_answers"]]


def _right_mass(row: Row, answers: Any) -> dict[str, Any]:
    """The share of the likelihood of all answers that the right ones have, as the harness does."""
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    labels = [1] * len(row["correct_answers"]) + [0] * len(row["incorrect_answers"])
    found: dict[str, Any] = process_results_mc2({"mc2_targets": {"labels": labels}}, answers)
    return found


_TRUTHFUL = ("question", "best_answer", "correct_answers", "incorrect_answers")

CHOICES: dict[str, Task] = {
    "blimp": Task(
        split="test",
        published=67_000,
        fields=("UID", "field", "sentence_good", "sentence_bad"),
        ask=lambda row: "",
        choices=_pair,
        target=_good,
        part=lambda row: str(row["field"]).replace("/", "_"),  # one paradigm of 67 is so spelt
    ),
    "hellaswag": Task(
        split="validation",
        published=10_042,
        fields=("activity_label", "ctx", "endings", "label"),
        ask=lambda row: f"{row['activity_label']}: {row['ctx']}",
        choices=lambda row: list(row["endings"]),
        target=lambda row: int(row["label"]),
        metrics=("acc", "acc_norm"),
    ),
    "arc_easy": Task(
        split="test",
        published=2_376,
        fields=("question", "choices", "answerKey"),
        ask=lambda row: f"Question: {row['question']}\nAnswer:",
        choices=lambda row: list(row["choices"]["text"]),
        target=_lettered,
        metrics=("acc", "acc_norm"),
        examples="train",
    ),
    "piqa": Task(
        split="validation",
        published=1_838,
        fields=("goal", "sol1", "sol2", "label"),
        ask=lambda row: f"Question: {row['goal']}\nAnswer:",
        choices=lambda row: [row["sol1"], row["sol2"]],
        target=lambda row: int(row["label"]),
        metrics=("acc", "acc_norm"),
        examples="train",
    ),
    "winogrande": Task(
        split="validation",
        published=1_267,
        fields=("sentence", "option1", "option2", "answer"),
        ask=lambda row: int(row["answer"]) - 1,
        choices=_beginnings,
        target=_end,
        is_infill=True,
        examples="train",
    ),
    "openbookqa": Task(
        split="test",
        published=500,
        fields=("question_stem", "choices", "answerKey"),
        ask=lambda row: str(row["question_stem"]),
        choices=lambda row: list(row["choices"]["text"]),
        target=_lettered,
        metrics=("acc", "acc_norm"),
        examples="train",
    ),
    "sst2": Task(
        split="validation",
        published=872,
        fields=("sentence", "label"),
        ask=lambda row: f"Review: {str(row['sentence']).strip()}\nSentiment:",
        choices=lambda row: ["negative", "positive"],
        target=lambda row: int(row["label"]),
        examples="train",
    ),
    "arc_challenge": Task(
        split="test",
        published=1_172,
        fields=("question", "choices", "answerKey"),
        ask=lambda row: f"Question: {row['question']}\nAnswer:",
        choices=lambda row: list(row["choices"]["text"]),
        target=_lettered,
        metrics=("acc", "acc_norm"),
        examples="train",
    ),
    "commonsense_qa": Task(
        split="validation",
        published=1_221,
        fields=("question", "choices", "answerKey"),
        ask=lambda row: "Question: " + _listed(row["question"], row["choices"]["text"], 5),
        choices=lambda row: list(LETTERS),
        target=_lettered,
        examples="train",
    ),
    "mathqa": Task(
        split="test",
        published=2_985,
        fields=("question", "choices", "answerKey"),
        ask=lambda row: f"Question: {row['question']}\nAnswer:",
        choices=lambda row: list(row["choices"]["text"]),
        target=_lettered,
        metrics=("acc", "acc_norm"),
    ),
    "mmlu": Task(
        split="test",
        published=14_042,
        fields=("subject", "question", "choices", "answer"),
        ask=lambda row: _listed(row["question"], row["choices"], 4),
        choices=lambda row: list(LETTERS[:4]),
        target=lambda row: int(row["answer"]),
        part=_subject,
        examples="train",
        first=True,
        alike=_subject,
        intro=lambda row: (
            "The following are multiple choice questions (with answers) about "
            f"{_subject(row).replace('_', ' ')}.\n\n"
        ),
    ),
    "truthfulqa_mc1": Task(
        folder="truthfulqa",
        split="validation",
        published=817,
        fields=_TRUTHFUL,
        ask=_after_examples,
        choices=_one_right,
        target=_best,
    ),
    "truthfulqa_mc2": Task(
        folder="truthfulqa",
        split="validation",
        published=817,
        fields=_TRUTHFUL,
        ask=_after_examples,
        choices=_many_right,
        target=lambda row: 0,
        judge=_right_mass,
        guess=lambda row: (
            len(row["correct_answers"])
            / (len(row["correct_answers"]) + len(row["incorrect_answers"]))
        ),
    ),
}
"""By name, which is also that of the folder."""
