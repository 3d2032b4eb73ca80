"""How much a text repeats itself: n-grams of its tokens, and loops at its end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = (2, 3, 4)
"""n of the n-grams."""

REPEATS = 3
"""A loop is said at least so often."""


@dataclass(frozen=True)
class Written:
    """One figure of what a model wrote; `n` counts prompts, or tokens where `unit` says so."""

    metric: str
    value: float
    standard_error: float | None  # over prompts
    n: int
    unit: str = "prompts"


def repeated(tokens: Sequence[int], n: int) -> float | None:
    """The share of n-grams that stood in the text before: rep-n. None: it is shorter than n.

    1 - different n-grams / n-grams, of one continuation. 0: nothing is said twice.

    Source: S. Welleck et al., arXiv:1908.04319, section 6 (seq-rep-n).
    """
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else None


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams over n-grams of all texts together: distinct-n. None: there is none.

    It falls where texts repeat each other too, and with their number and length: only texts of
    the same prompts and length compare.

    Source: J. Li et al., arXiv:1510.03055, section 5 (for n = 1 and 2).
    """
    grams = [gram for tokens in texts for gram in ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else None


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Every n tokens that stand beside each other."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def loop(tokens: Sequence[int]) -> int | None:
    """The period of the loop that a text ends in; None: it ends in none.

    The second half of the tokens is one sequence said over and over, at least three times (the
    last time may be cut). The shortest such period.
    """
    tail = list(tokens[len(tokens) // 2 :])
    for period in range(1, len(tail) // REPEATS + 1):
        if all(one == other for one, other in zip(tail, tail[period:], strict=False)):
            return period
    return None


def figures(
    texts: Sequence[Sequence[int]], is_ended: Sequence[bool] | None = None
) -> list[Written]:
    """What can be said of the tokens of continuations alone.

    Args:
        texts: the tokens of each, without the token that ends it.
        is_ended: whether such a token came; None: it is not known.
    """
    found = []
    for n in ORDERS:
        shares = [share for text in texts if (share := repeated(text, n)) is not None]
        if shares:
            found.append(_mean(f"rep-{n}", shares))
    for n in ORDERS:
        value = distinct(texts, n)
        if value is not None:
            found.append(Written(f"distinct-{n}", value, _jackknife(texts, n), len(texts)))
    ends = is_ended if is_ended is not None else [False] * len(texts)
    loops = [
        float(not ended and loop(text) is not None) for text, ended in zip(texts, ends, strict=True)
    ]
    found.append(_mean("loop rate", loops))
    if is_ended is not None:
        found.append(_mean("ended by itself", [float(one) for one in is_ended]))
    return found


def _mean(metric: str, values: Sequence[float]) -> Written:
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return Written(metric, float(np.mean(values)), error, len(values))


def _jackknife(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """The standard error of distinct-n over texts, each left out in turn."""
    if len(texts) < 2:
        return None
    grams = [ngrams(text, n) for text in texts]
    holders: dict[tuple[int, ...], set[int]] = {}
    for place, own in enumerate(grams):
        for gram in own:
            holders.setdefault(gram, set()).add(place)
    alone = np.zeros(len(texts))  # n-grams that are gone with a text
    for places in holders.values():
        if len(places) == 1:
            alone[next(iter(places))] += 1
    sizes = np.array([len(own) for own in grams], dtype=float)
    rest = sizes.sum() - sizes
    if (rest == 0).any():
        return None
    left = (len(holders) - alone) / rest
    k = len(texts)
    return float(np.sqrt((k - 1) / k * ((left - left.mean()) ** 2).sum()))
