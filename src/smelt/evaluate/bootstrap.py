"""Resampling of units: how often each is drawn, and what a difference is over all the draws."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smelt.evaluate.aggregates import AGGREGATES, Columns

RESAMPLES = 10_000
LEVEL = 0.95
_AT_A_TIME = 500


@dataclass(frozen=True)
class Difference:
    """How much more one model has of a metric than another, on the same units."""

    mean: float  # the difference of the two values
    low: float
    high: float  # of the percentile interval at `LEVEL`
    p: float  # two-sided: how often resampling takes the difference to the other side of 0, twice
    n: int  # units
    resamples: int


def draw_counts(generator: np.random.Generator, size: int, resamples: int) -> NDArray[np.int64]:
    """How often every one of `size` units is drawn in each resample, [resamples, size]."""
    rows = [
        np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(resamples)
    ]
    return np.stack(rows)


def paired_differences(
    aggregates: Sequence[str],
    ours: Sequence[Columns],
    theirs: Sequence[Columns],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Difference]:
    """Ours less theirs, for metrics of the same units; both sides are resampled together.

    A resample draws n units with replacement and takes every metric of both models on them, so
    that what is hard for both falls out of the difference. The draws depend on n and the seed
    alone. The p-value counts the resamples on the other side of 0, or on it, plus one.

    Args:
        aggregates: of each metric, in `aggregates.AGGREGATES`.
        ours: [n, C] of each metric.
        theirs: of the other model, the same units in the same order.
        seed: of the draws.
        resamples: draws; 10,000 give a p-value to about 0.005 at 0.05.

    Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap (1993), sections 13.3, 15.4.
    """
    n = len(ours[0])
    found: list[list[NDArray[np.float64]]] = [[] for _ in aggregates]
    for counts in _chunks(n, seed, resamples):
        for kept, name, one, other in zip(found, aggregates, ours, theirs, strict=True):
            value = AGGREGATES[name].value
            kept.append(value(counts @ one, n) - value(counts @ other, n))
    return [
        _difference(name, one, other, np.concatenate(kept))
        for kept, name, one, other in zip(found, aggregates, ours, theirs, strict=True)
    ]


def _chunks(n: int, seed: int, resamples: int) -> Iterator[NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    for done in range(0, resamples, _AT_A_TIME):
        yield draw_counts(generator, n, min(_AT_A_TIME, resamples - done)).astype(np.float64)


def _difference(
    name: str, ours: Columns, theirs: Columns, drawn: NDArray[np.float64]
) -> Difference:
    n, value = len(ours), AGGREGATES[name].value
    mean = float(value(ours.sum(0), n) - value(theirs.sum(0), n))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    sides = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (sides + 1) / (len(drawn) + 1))
    return Difference(mean, float(low), float(high), p, n, len(drawn))
