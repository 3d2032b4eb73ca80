"""Answers that need no model: what a result must stand above before it says anything.

Each rule gives answers of the same kind as a model does, so that the same metrics measure them on
the same items. Rules may learn from the training split, as models do; never from the reported one.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from smelt.text2text.items import Answer, Item
from smelt.text2text.metrics import measure
from smelt.text2text.tasks import Task
from smelt.text2text.words import asked_words, content_words, sentences, words

NUM_ORDERS = 20  # random orders whose scores are averaged
WINDOW_WORDS = 4  # of the answer that is guessed beside the question's words
NEAR_WORDS = 10

Rule = Callable[[Item], Answer]


def trivial(
    task: Task, train: Sequence[Item], items: Sequence[Item]
) -> dict[str, dict[str, float]]:
    """By metric, what each rule without a model reaches on the items.

    Args:
        task: the benchmark.
        train: its training items.
        items: those that are reported.
    """
    levels: dict[str, dict[str, float]] = {}
    for name, answers in _answers(task, train, items):
        found = [measure(task, items, some) for some in answers]
        for place, first in enumerate(found[0]):
            mean = float(np.mean([one[place].value for one in found]))
            levels.setdefault(first.metric, {})[name] = mean
    return levels


def _answers(
    task: Task, train: Sequence[Item], items: Sequence[Item]
) -> Iterable[tuple[str, list[list[Answer]]]]:
    """Every rule's answers, of those that draw lots several times."""
    if task.kind == "answer":
        for name, rule in _answering(train).items():
            yield name, [[rule(item) for item in items]]
        return
    majority = Counter(item.label for item in train).most_common(1)[0][0]
    yield "majority of training", [[_choice(item, majority) for item in items]]
    if task.kind == "rank":
        inverse = inverse_frequency(train)
        yield "original order", [[_choice(item, 0) for item in items]]
        yield "random order", [_lots(items, seed) for seed in range(NUM_ORDERS)]
        yield "shared words", [[_overlap(item, lambda _: 1.0) for item in items]]
        yield "shared words, rare ones more", [[_overlap(item, inverse) for item in items]]
    elif task.kind == "judge" or task.has_f1:
        yield "always yes", [[_choice(item, 1) for item in items]]


def _choice(item: Item, label: int | None) -> Answer:
    return Answer(tuple(float(place == label) for place in range(len(item.choices))))


def _lots(items: Sequence[Item], seed: int) -> list[Answer]:
    """Scores drawn at random."""
    drawn = np.random.default_rng(seed).random(len(items))
    return [Answer((0.0, float(one) - 1.0)) for one in drawn]  # "no" is the likelier one


# --- ranking -------------------------------------------------------------------------------------


def inverse_frequency(train: Sequence[Item]) -> Callable[[str], float]:
    """How rare a word is in the training sentences: log of their number over those that hold it."""
    seen: Counter[str] = Counter()
    for item in train:
        seen.update(set(words(item.context)))
    return lambda word: math.log((len(train) + 1) / (seen[word] + 1))


def _overlap(item: Item, weight: Callable[[str], float]) -> Answer:
    """How much of the question's words a sentence holds."""
    shared = asked_words(item.question) & content_words(item.context)
    return Answer((0.0, sum(weight(word) for word in sorted(shared)) - 1e6))


# --- answering -----------------------------------------------------------------------------------


def _answering(train: Sequence[Item]) -> dict[str, Rule]:
    frequent = Counter(item.target for item in train).most_common(1)[0][0]
    return {
        "most frequent answer": lambda _: Answer(text=frequent),
        "first sentence": lambda item: Answer(text=sentences(item.context)[0]),
        "sentence nearest the question": lambda item: Answer(text=_nearest_sentence(item)),
        "words nearest the question's": lambda item: Answer(text=nearest_window(item)),
    }


def _nearest_sentence(item: Item) -> str:
    """The sentence with the most of the question's words; the first of equal ones."""
    asked = asked_words(item.question)
    return max(sentences(item.context), key=lambda one: len(asked & content_words(one)))


def nearest_window(item: Item) -> str:
    """Four words beside which the most of the question's words stand, and among which none does.

    The one that is right most often: a question repeats what stands around its answer.
    """
    asked = asked_words(item.question)
    found = [(m.start(), m.end(), m.group().lower()) for m in re.finditer(r"\w+", item.context)]
    best, at = -1.0, 0
    for begin in range(max(1, len(found) - WINDOW_WORDS + 1)):
        end = begin + WINDOW_WORDS
        inside = {word for *_, word in found[begin:end]}
        around = {
            word
            for *_, word in found[max(0, begin - NEAR_WORDS) : begin]
            + found[end : end + NEAR_WORDS]
        }
        score = len(asked & around) - len(asked & inside)
        if score > best:
            best, at = score, begin
    last = found[at : at + WINDOW_WORDS]
    return item.context[last[0][0] : last[-1][1]] if last else ""
