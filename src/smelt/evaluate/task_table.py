"""The tasks a causal model is asked with no training for them: file, prompt, answers, metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""An item of a task file, and `place`: where it stands among those that are asked."""


@dataclass(frozen=True)
class Task:
    """How the items of a file become questions with a score.

    The functions are what lm-evaluation-harness knows as doc_to_text, doc_to_choice and
    doc_to_target; it writes a blank before every choice.
    """

    split: str
    published: int  # items of the whole public split: fewer of them are a subset
    fields: tuple[str, ...]  # that every item has
    ask: Callable[[Row], str | int]
    """The question; for `is_infill`, which choice is right."""
    target: Callable[[Row], int | str]
    """Which choice is right; without choices, the word; for `is_infill`, what every choice is
    continued with."""
    choices: Callable[[Row], list[str]] | None = None  # None: the target is the only answer
    metrics: tuple[str, ...] = ("acc",)
    is_infill: bool = False  # the choices are beginnings, and their common end is what is scored
    part: Callable[[Row], str] | None = None  # scores are given by part too


def _pair(row: Row) -> list[str]:
    """The two sentences of BLiMP; the good one stands first in every other pair.

    The harness takes the first of two equal scores. Where the good one is always first, a model
    that tells nothing apart is right every time.
    """
    pair = [row["sentence_good"], row["sentence_bad"]]
    return pair if _good(row) == 0 else pair[::-1]


def _good(row: Row) -> int:
    return int(row["place"]) % 2


def _all_but_last_word(row: Row) -> str:
    return str(row["text"]).rpartition(" ")[0]


def _last_word(row: Row) -> str:
    return " " + str(row["text"]).rpartition(" ")[2]


def _beginnings(row: Row) -> list[str]:
    begin = str(row["sentence"]).partition("_")[0]
    return [begin + row["option1"], begin + row["option2"]]


def _end(row: Row) -> str:
    return str(row["sentence"]).partition("_")[2].strip()


_JOINED = {"cause": "because", "effect": "so"}


def _premise(row: Row) -> str:
    return f"{row['premise'].strip().rstrip('.')} {_JOINED[row['question']]}"


def _uncapitalised(text: str) -> str:
    """The sentence as it goes on after another; "I" stays."""
    return text if text.startswith("I ") else text[:1].lower() + text[1:]


def _lettered(row: Row) -> int:
    """The place of the right answer among those that carry letters."""
    return int(row["choices"]["label"].index(row["answerKey"]))


TASKS: dict[str, Task] = {
    "blimp": Task(
        split="test",
        published=67_000,
        fields=("UID", "field", "sentence_good", "sentence_bad"),
        ask=lambda row: "",
        choices=_pair,
        target=_good,
        part=lambda row: str(row["field"]).replace("/", "_"),  # one paradigm of 67 is so spelt
    ),
    "lambada": Task(
        split="test",
        published=5_153,
        fields=("text",),
        ask=_all_but_last_word,
        target=_last_word,
        metrics=("acc", "perplexity"),
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
    ),
    "piqa": Task(
        split="validation",
        published=1_838,
        fields=("goal", "sol1", "sol2", "label"),
        ask=lambda row: f"Question: {row['goal']}\nAnswer:",
        choices=lambda row: [row["sol1"], row["sol2"]],
        target=lambda row: int(row["label"]),
        metrics=("acc", "acc_norm"),
    ),
    "winogrande": Task(
        split="validation",
        published=1_267,
        fields=("sentence", "option1", "option2", "answer"),
        ask=lambda row: int(row["answer"]) - 1,
        choices=_beginnings,
        target=_end,
        is_infill=True,
    ),
    "copa": Task(
        split="validation",
        published=100,
        fields=("premise", "choice1", "choice2", "question", "label"),
        ask=_premise,
        choices=lambda row: [_uncapitalised(row["choice1"]), _uncapitalised(row["choice2"])],
        target=lambda row: int(row["label"]),
    ),
    "openbookqa": Task(
        split="test",
        published=500,
        fields=("question_stem", "choices", "answerKey"),
        ask=lambda row: str(row["question_stem"]),
        choices=lambda row: list(row["choices"]["text"]),
        target=_lettered,
        metrics=("acc", "acc_norm"),
    ),
    "boolq": Task(
        split="validation",
        published=3_270,
        fields=("passage", "question", "label"),
        ask=lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
        choices=lambda row: ["no", "yes"],
        target=lambda row: int(row["label"]),
    ),
    "sst2": Task(
        split="validation",
        published=872,
        fields=("sentence", "label"),
        ask=lambda row: f"Review: {str(row['sentence']).strip()}\nSentiment:",
        choices=lambda row: ["negative", "positive"],
        target=lambda row: int(row["label"]),
    ),
    "rte": Task(
        split="validation",
        published=277,
        fields=("premise", "hypothesis", "label"),
        ask=lambda row: f"{row['premise']}\nQuestion: {row['hypothesis']} True or False?\nAnswer:",
        choices=lambda row: ["True", "False"],
        target=lambda row: ("entailment", "not_entailment").index(row["label"]),
    ),
}
"""Every task by its name, which is also that of its folder."""
