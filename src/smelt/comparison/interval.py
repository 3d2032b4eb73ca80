"""How sure a difference is: the mean of a table of seeds × units, and its 95 % interval."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from smelt.evaluate.bootstrap import draw_counts

LEVEL = 0.95
Table = NDArray[np.float64]
"""[S, n]: a value for every seed and unit; the units are the same for all seeds."""


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; None: one seed and one unit say nothing of it."""

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    seeds: int
    units: int


def interval(table: Table, *, resamples: int = 2000) -> Interval:
    """The mean over seeds and units, with a bootstrap interval over both.

    A replicate draws S seeds and n units, each with replacement, and takes the mean of the crossed
    table. Replicates vary too little where there are few seeds and too much where seeds and units
    interact, so their deviations from the mean are stretched to the standard error of the variance
    components (unbiased, of seeds at least 0), and from normal to Student's t by Satterthwaite's
    degrees of freedom. With one seed, units alone are drawn, and the interval is of that seed.

    Args:
        table: of differences, for a paired interval.
        resamples: replicates.

    Source: A. Owen, "The pigeonhole bootstrap", arXiv:0712.1111, for crossed resampling and its
    excess. The stretching is ours.
    """
    seeds, units = table.shape
    mean = float(table.mean())
    error, freedom = standard_error(table)
    if error is None:
        return Interval(mean, None, None, None, seeds, units)
    deviations = replicates(table, resamples) - mean
    spread = float(deviations.std())
    if spread == 0 or error == 0:
        return Interval(mean, mean, mean, 0.0, seeds, units)
    tail = (1 - LEVEL) / 2
    t, z = stats.t.ppf(1 - tail, freedom), stats.norm.ppf(1 - tail)
    stretch = float(t / z) * error / spread
    low, high = np.quantile(deviations, [tail, 1 - tail]) * stretch
    return Interval(mean, mean + float(low), mean + float(high), error, seeds, units)


def replicates(table: Table, resamples: int) -> NDArray[np.float64]:
    """Means of crossed resamples [B]; the draws are the same for all tables of one shape."""
    of_seeds, of_units = draws(*table.shape, resamples)
    by_unit = of_seeds @ table / len(table)  # [B, n]
    means: Table = np.einsum("bn,bn->b", by_unit, of_units) / table.shape[1]
    return means


@lru_cache(maxsize=8)
def draws(seeds: int, units: int, resamples: int) -> tuple[Table, NDArray[np.uint8]]:
    """How often every seed [B, S] and every unit [B, n] is drawn."""
    generator = np.random.default_rng(0)
    of_seeds = draw_counts(generator, seeds, resamples)
    of_units = draw_counts(generator, units, resamples)
    return of_seeds.astype(np.float64), of_units.astype(np.uint8)


def standard_error(table: Table) -> tuple[float | None, float]:
    """Of the mean, from the components of variance; and its degrees of freedom.

    Seeds and units are random and crossed. With mean squares MS between seeds, between units and of
    what is left, Var(mean) = (MS_units + max(0, MS_seeds − MS_left)) / (S n).
    """
    S, n = table.shape
    if S * n == 1:
        return None, math.inf
    if S == 1 or n == 1:
        size = max(S, n)
        return float(table.std(ddof=1)) / math.sqrt(size), size - 1
    mean = table.mean()
    rows, columns = table.mean(1) - mean, table.mean(0) - mean
    left = table - mean - rows[:, None] - columns
    of_seeds = n * float(rows @ rows) / (S - 1)
    of_units = S * float(columns @ columns) / (n - 1)
    of_left = float((left**2).sum()) / ((S - 1) * (n - 1))
    total, squares = of_units, of_units**2 / (n - 1)
    if of_seeds > of_left:
        total += of_seeds - of_left
        squares += of_seeds**2 / (S - 1) + of_left**2 / ((S - 1) * (n - 1))
    freedom = total**2 / squares if squares else math.inf
    return math.sqrt(total / (S * n)), max(freedom, 1.0)
