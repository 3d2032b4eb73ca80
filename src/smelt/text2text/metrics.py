"""What answers are worth: every metric with its standard error, n and the level of guessing."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from smelt.text2text import words
from smelt.text2text.items import Answer, Item
from smelt.text2text.tasks import Task

RESAMPLES = 1000
"""Of the bootstrap, by which F1 over all items has its standard error; the seed is always 0."""

POSITIVE = 1
"""The choice that F1 and rankings are about: yes."""


@dataclass(frozen=True)
class Score:
    """One metric over the items of a benchmark."""

    metric: str
    value: float
    standard_error: float | None  # None: of one unit
    n: int  # units: items, questions
    unit: str = "items"
    trivial: Mapping[str, float] = field(default_factory=dict)
    """The same metric of rules that know nothing (`smelt.text2text.baselines`)."""


@dataclass(frozen=True)
class Measured:
    """A metric as a mean of one value per unit, or as a function of all of them."""

    metric: str
    value: float
    values: Mapping[str, float]  # by item or question: what two models are compared by, paired
    unit: str = "items"
    error: float | None = None  # where the value is no mean of the values

    def score(self) -> Score:
        """The metric with its standard error."""
        error = self.error if self.error is not None else standard_error(list(self.values.values()))
        return Score(self.metric, self.value, error, len(self.values), self.unit)


def measure(task: Task, items: Sequence[Item], answers: Sequence[Answer]) -> list[Measured]:
    """The metrics of a benchmark; the first is the one that it is known by."""
    if len(items) != len(answers) or not items:
        raise ValueError(f"{len(answers)} answers to {len(items)} items")
    return MEASURES[task.kind](task, items, answers)


def standard_error(values: Sequence[float]) -> float | None:
    """Of a mean: standard deviation (n - 1) / √n."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _classified(task: Task, items: Sequence[Item], answers: Sequence[Answer]) -> list[Measured]:
    found = [_accuracy(items, answers)]
    if task.has_f1:
        found.append(_f1("F1", items, answers, {item.name: item.name for item in items}, "items"))
    return found


def _accuracy(items: Sequence[Item], answers: Sequence[Answer]) -> Measured:
    right = {
        item.name: float(answer.choice == item.label)
        for item, answer in zip(items, answers, strict=True)
    }
    return Measured("accuracy", _mean(right), right)


def _judged(_: Task, items: Sequence[Item], answers: Sequence[Answer]) -> list[Measured]:
    """MultiRC: two metrics that are often mistaken for each other, and accuracy."""
    questions: dict[str, float] = {}
    for item, answer in zip(items, answers, strict=True):
        right = float(answer.choice == item.label)
        questions[item.group] = min(questions.get(item.group, 1.0), right)
    groups = {item.name: item.group for item in items}
    return [
        _f1("F1 of answers", items, answers, groups, "questions"),
        Measured("exact match of questions", _mean(questions), questions, "questions"),
        _accuracy(items, answers),
    ]


def _ranked(_: Task, items: Sequence[Item], answers: Sequence[Answer]) -> list[Measured]:
    """WikiQA: the candidates of a question by how much likelier yes is than no; ties as they stand.

    Questions without a right candidate have no ranking that could be right: as usual they are left
    out, and counted as 0 in "MAP, all questions".
    """
    questions: dict[str, list[tuple[float, bool]]] = {}
    for item, answer in zip(items, answers, strict=True):
        margin = answer.scores[POSITIVE] - answer.scores[1 - POSITIVE]
        questions.setdefault(item.group, []).append((margin, item.label == POSITIVE))
    ranked = {
        group: [is_right for _, is_right in sorted(found, key=lambda one: -one[0])]
        for group, found in questions.items()
    }
    average = {group: average_precision(found) for group, found in ranked.items()}
    kept = [group for group, found in ranked.items() if any(found)]
    reciprocal = {group: 1 / (ranked[group].index(True) + 1) for group in kept}
    known = {group: average[group] for group in kept}
    return [
        Measured("MAP", _mean(known), known, "questions with an answer"),
        Measured("MRR", _mean(reciprocal), reciprocal, "questions with an answer"),
        Measured("MAP, all questions", _mean(average), average, "questions"),
        _accuracy(items, answers),
    ]


def average_precision(ranked: Sequence[bool]) -> float:
    """The mean precision at the places of the right ones; 0 where there are none."""
    found, total = 0, 0.0
    for place, is_right in enumerate(ranked, 1):
        if is_right:
            found += 1
            total += found / place
    return total / found if found else 0.0


def _answered(task: Task, items: Sequence[Item], answers: Sequence[Answer]) -> list[Measured]:
    f1 = words.hotpot_f1 if task.has_yes_no else words.word_f1
    pairs = list(zip(items, answers, strict=True))
    shared = {item.name: f1(answer.text, item.references) for item, answer in pairs}
    exact = {item.name: words.exact_match(answer.text, item.references) for item, answer in pairs}
    return [Measured("F1", _mean(shared), shared), Measured("EM", _mean(exact), exact)]


def _f1(
    name: str,
    items: Sequence[Item],
    answers: Sequence[Answer],
    groups: Mapping[str, str],
    unit: str,
) -> Measured:
    """F1 of "yes" over all items; its error by resampling whole groups.

    The value of a group is its share of right answers: F1 itself has none.
    """
    counts: dict[str, NDArray[np.int64]] = {}
    for item, answer in zip(items, answers, strict=True):
        said, is_so = answer.choice == POSITIVE, item.label == POSITIVE
        one = np.array([said and is_so, said, is_so, answer.choice == item.label, True])
        group = groups[item.name]
        counts[group] = counts.get(group, np.zeros(5, np.int64)) + one
    table = np.stack(list(counts.values()))
    draws = np.random.default_rng(0)
    found = [
        f1_of(*table[draws.integers(len(table), size=len(table))].sum(0)[:3])
        for _ in range(RESAMPLES)
    ]
    values = {group: float(one[3] / one[4]) for group, one in counts.items()}
    error = float(np.std(found, ddof=1)) if len(table) > 1 else None
    return Measured(name, f1_of(*table.sum(0)[:3]), values, unit, error)


def f1_of(both: int, said: int, is_so: int) -> float:
    """F1 from counts: said and so, said, so. 0 where nothing is said or nothing is so."""
    return float(2 * both / (said + is_so)) if said + is_so else 0.0


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values()))) if values else math.nan


MEASURES: dict[str, Callable[[Task, Sequence[Item], Sequence[Answer]], list[Measured]]] = {
    "classify": _classified,
    "judge": _judged,
    "rank": _ranked,
    "answer": _answered,
}
