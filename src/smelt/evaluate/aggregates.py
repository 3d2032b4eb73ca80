"""Metrics as functions of sums over units: their value, its standard error, their resampled values.

Every metric here depends on the sums of a few columns over the units (items, questions, documents)
and on their number. So one table of columns gives the value, the error, and any resample of units.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Columns = NDArray[np.float64]
"""[n, C]: what every unit adds to the C sums of a metric."""

Sums = NDArray[np.float64]
"""[..., C]: sums over units, of one sample or of many."""


@dataclass(frozen=True)
class Aggregate:
    """How columns become a number."""

    value: Callable[[Sums, int], NDArray[np.float64]]
    """[...] from sums and the number of units."""
    influence: Callable[[Columns], NDArray[np.float64]]
    """What each unit adds to the value, to first order; the sum over all units is 0."""


def value(aggregate: str, columns: Columns) -> float:
    """The metric over all units."""
    return float(AGGREGATES[aggregate].value(columns.sum(0), len(columns)))


def standard_error(aggregate: str, columns: Columns) -> float | None:
    """Of the value, over units: sd / √n of a mean, and to first order of what is none.

    None: one unit says nothing of it.
    """
    n = len(columns)
    if n < 2:
        return None
    with np.errstate(invalid="ignore"):  # Inf - Inf: an infinite value has no error
        squares = float((AGGREGATES[aggregate].influence(columns) ** 2).sum())
    return math.sqrt(squares * n / (n - 1)) if math.isfinite(squares) else None


def _mean(sums: Sums, n: int) -> NDArray[np.float64]:
    return np.asarray(sums[..., 0] / n)


def _of_mean(columns: Columns) -> NDArray[np.float64]:
    return np.asarray((columns[:, 0] - columns[:, 0].mean()) / len(columns))


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ratio of two sums; 0 where there is nothing below."""
    found = np.zeros(np.broadcast(above, below).shape)
    return np.asarray(np.divide(above, below, out=found, where=below != 0))


def _of_ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    total = below.sum()
    return (above - _ratio(above.sum(), total) * below) / (total or 1.0)


def _exp(nats: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(nats))


def _f1(sums: Sums, first: int = 0) -> NDArray[np.float64]:
    both, said, so = (sums[..., first + i] for i in range(3))
    return _ratio(2 * both, said + so)


def _of_f1(columns: Columns, first: int = 0) -> NDArray[np.float64]:
    both, said, so = (columns[:, first + i] for i in range(3))
    return _of_ratio(2 * both, said + so)


def _macro(sums: Sums) -> NDArray[np.float64]:
    classes = range(0, sums.shape[-1], 3)
    return np.asarray(np.mean([_f1(sums, first) for first in classes], axis=0))


def _of_macro(columns: Columns) -> NDArray[np.float64]:
    classes = range(0, columns.shape[1], 3)
    return np.asarray(np.mean([_of_f1(columns, first) for first in classes], axis=0))


AGGREGATES: Mapping[str, Aggregate] = {
    "mean": Aggregate(_mean, _of_mean),
    "perplexity": Aggregate(  # of log-likelihoods
        lambda sums, n: _exp(-_mean(sums, n)),
        lambda columns: _exp(-columns[:, 0].mean()) * _of_mean(columns),
    ),
    "weighted perplexity": Aggregate(  # of log-likelihoods and lengths
        lambda sums, n: _exp(-_ratio(sums[..., 0], sums[..., 1])),
        lambda columns: (
            _exp(-_ratio(columns[:, 0].sum(), columns[:, 1].sum()))
            * _of_ratio(columns[:, 0], columns[:, 1])
        ),
    ),
    "bits": Aggregate(  # of log-likelihoods and lengths
        lambda sums, n: -_ratio(sums[..., 0], sums[..., 1]) / math.log(2),
        lambda columns: _of_ratio(columns[:, 0], columns[:, 1]) / math.log(2),
    ),
    "ratio": Aggregate(  # of sums and counts
        lambda sums, n: _ratio(sums[..., 0], sums[..., 1]),
        lambda columns: _of_ratio(columns[:, 0], columns[:, 1]),
    ),
    # Of: said and so, said, so; of three such columns for every class.
    "F1": Aggregate(lambda sums, n: _f1(sums), _of_f1),
    "macro F1": Aggregate(lambda sums, n: _macro(sums), _of_macro),
}
"""By name, as files of outcomes spell it."""
