"""The scores of benchmarks, slowly and by their definitions."""

import re
import string
from collections import Counter
from itertools import permutations


def squad_f1(answer: str, reference: str) -> float:
    """Word F1 as the SQuAD v1.1 paper defines it, words matched one by one."""

    def plain(text: str) -> list[str]:
        text = text.lower()
        for mark in string.punctuation:
            text = text.replace(mark, "")
        return [word for word in text.split() if word not in ("a", "an", "the")]

    said, right = plain(answer), plain(reference)
    if not said or not right:
        return float(said == right)
    left = list(right)
    shared = 0
    for word in said:
        if word in left:
            left.remove(word)
            shared += 1
    precision, recall = shared / len(said), shared / len(right)
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def average_precision(scores: list[float], labels: list[int]) -> float:
    """The mean, over the right candidates, of the share of right ones down to it."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranked = [labels[i] for i in order]
    right = [place for place, label in enumerate(ranked) if label]
    return sum(sum(ranked[: at + 1]) / (at + 1) for at in right) / len(right) if right else 0.0


def expected_average_precision(labels: list[int]) -> float:
    """Over every order of the candidates."""
    orders = list(permutations(labels))
    return sum(average_precision([-i for i in range(len(o))], list(o)) for o in orders) / len(
        orders
    )


def binary_f1(said: list[int], right: list[int]) -> float:
    """Of the label 1, from precision and recall."""
    both = Counter(zip(said, right, strict=True))
    if not both[1, 1]:
        return 0.0
    precision = both[1, 1] / (both[1, 1] + both[1, 0])
    recall = both[1, 1] / (both[1, 1] + both[0, 1])
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> set[str]:
    """Distinct words."""
    return set(re.findall(r"\w+", text.lower()))
