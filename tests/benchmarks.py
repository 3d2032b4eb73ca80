"""Small task files in the published formats: what tests read in place of SMELT_DATA."""

import gzip
import json
from pathlib import Path
from typing import Any

COLOURS = ("red", "green", "blue", "white", "black", "grey")
THINGS = ("house", "boat", "car", "door", "bird", "coat", "lamp", "book")


def write_split(folder: Path, task: str, split: str, records: list[Any]) -> Path:
    """A task's file with these records."""
    path = folder / task / f"{split}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(
            (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)) + "\n"
            for one in records
        )
    return path


def sst2(number: int) -> dict[str, Any]:
    label = number % 2
    return {"sentence": f"the {THINGS[number % 8]} is {('bad', 'good')[label]}", "label": label}


def mrpc(number: int) -> dict[str, Any]:
    label = number % 3 > 0  # two of three
    first = f"The {THINGS[number % 8]} is {COLOURS[number % 6]}."
    second = first if label else f"A {THINGS[(number + 1) % 8]} came."
    return {"sentence1": first, "sentence2": second, "label": int(label), "id1": "1", "id2": "2"}


def multirc(number: int) -> dict[str, Any]:
    thing, colour = THINGS[number % 8], COLOURS[number % 6]
    answers = [
        {"text": colour, "idx": 0, "label": 1},
        {"text": COLOURS[(number + 1) % 6], "idx": 1, "label": 0},
        {"text": "", "idx": 2, "label": 0},  # as three of the published ones
    ]
    questions = [
        {"question": f"Which colour is the {thing}?", "answers": answers, "idx": 0},
        {"question": f"Is the {thing} {colour}?", "answers": answers[:2], "idx": 1},
    ]
    passage = {"text": f"The {thing} is {colour}. It is old.", "questions": questions}
    return {"idx": number, "version": 1.1, "passage": passage}


def copa(number: int) -> dict[str, Any]:
    return {
        "premise": f"The {THINGS[number % 8]} fell.",
        "choice1": "It broke.",
        "choice2": "It sang.",
        "question": ("cause", "effect")[number // 2 % 2],
        "label": number % 2,
        "idx": number,
    }


def winogrande(number: int) -> dict[str, Any]:
    return {
        "qID": f"PAIR{number // 2}-{number % 2 + 1}",
        "sentence": f"Ann gave Bob the {THINGS[number % 8]} because _ was kind.",
        "option1": "Ann",
        "option2": "Bob",
        "answer": str(number % 2 + 1),
    }


def squad(number: int) -> dict[str, Any]:
    thing, colour = THINGS[number % 8], COLOURS[number % 6]
    context = f"It is late.  The {thing} was painted {colour} in 19{number % 90 + 10}. Rain fell."
    return {
        "id": str(number),
        "title": "",
        "context": context,
        "question": f"What was painted {colour}?",
        "answers": {"text": [thing], "answer_start": [context.index(thing)]},
    }


def hotpotqa(number: int) -> dict[str, Any]:
    thing, colour = THINGS[number % 8], COLOURS[number % 6]
    context = [
        {"title": "Weather", "text": "Rain fell on the hills."},
        {"title": "Paint", "text": f"The {thing} was painted {colour} by Ann."},
    ]
    answer = colour if number % 3 else "yes"
    return {
        "id": str(number),
        "question": f"Which colour has the painted {thing}?",
        "answer": answer,
        "type": "bridge",
        "level": "easy",
        "supporting_titles": ["Paint", "Weather"],
        "context": context,
    }


def wikiqa(number: int) -> dict[str, Any]:
    question, place = divmod(number, 3)
    thing = THINGS[question % 8]
    is_right = place == 1 and question % 3 > 0  # a third of the questions has no answer
    answer = f"The {thing} is {COLOURS[question % 6]} ." if is_right else "Rain fell on the hills ."
    return {
        "question_id": f"q{question}",
        "question": f"what colour has the {thing} ?",
        "answer": answer,
        "label": int(is_right),
    }


MAKERS = {
    one.__name__: one for one in (sst2, mrpc, multirc, copa, winogrande, squad, hotpotqa, wikiqa)
}


def write_tasks(folder: Path, *, train: int = 60, rest: int = 18) -> Path:
    """Files of all eight tasks and splits, in `folder`."""
    for task, make in MAKERS.items():
        for at, split in enumerate(("train", "validation", "test")):
            number = train if split == "train" else rest
            write_split(folder, task, split, [make(1008 * at + i) for i in range(number)])
    return folder
