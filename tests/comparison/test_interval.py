"""Laws of the interval: against a slow one, and how often it holds the truth."""

import numpy as np
import pytest
from scipy import stats

from smelt.comparison.interval import draws, interval, replicates, standard_error


def slow_replicates(table, resamples):
    """The same draws, cell by cell."""
    of_seeds, of_units = draws(*table.shape, resamples)
    found = []
    for seeds, units in zip(of_seeds, of_units, strict=True):
        values = [
            table[s, i]
            for s in range(table.shape[0])
            for _ in range(int(seeds[s]))
            for i in range(table.shape[1])
            for _ in range(int(units[i]))
        ]
        found.append(np.mean(values))
    return np.array(found)


def test_replicates_are_the_means_of_drawn_seeds_and_units():
    table = np.random.default_rng(0).normal(size=(3, 7))
    assert np.allclose(replicates(table, 40), slow_replicates(table, 40))
    of_seeds, of_units = draws(3, 7, 40)
    assert (of_seeds.sum(1) == 3).all() and (of_units.sum(1) == 7).all()


def test_the_standard_error_is_unbiased_where_seeds_and_units_are_random():
    draw = np.random.default_rng(1)
    variance, S, n = [], 4, 30
    for _ in range(1500):
        table = 0.5 * draw.normal(size=(S, 1)) + draw.normal(size=(1, n)) + draw.normal(size=(S, n))
        error, _ = standard_error(table)
        variance.append(error**2)
    truth = 0.25 / S + 1 / n + 1 / (S * n)
    assert np.mean(variance) == pytest.approx(truth, rel=0.05)


def test_the_standard_error_of_one_seed_is_that_of_its_items():
    values = np.random.default_rng(2).normal(size=(1, 50))
    error, freedom = standard_error(values)
    assert error == pytest.approx(stats.sem(values[0])) and freedom == 49
    assert standard_error(values.T)[0] == pytest.approx(error)


@pytest.mark.parametrize(
    ("seeds", "of_seeds", "of_units", "left"),
    [(3, 1.0, 0.0, 0.01), (3, 0.0, 1.0, 0.01), (3, 0.0, 0.0, 1.0), (3, 0.06, 0.3, 1.0),
     (5, 0.06, 0.3, 1.0), (1, 0.0, 1.0, 0.0)],
)  # fmt: skip
def test_the_interval_holds_the_truth_in_about_95_of_100_studies(seeds, of_seeds, of_units, left):
    draw, units, hits, number = np.random.default_rng(3), 150, 0, 400
    for _ in range(number):
        table = (
            of_seeds * draw.normal(size=(seeds, 1))
            + of_units * draw.normal(size=(1, units))
            + left * draw.normal(size=(seeds, units))
        )
        found = interval(table, resamples=200)
        hits += found.low <= 0 <= found.high
    assert 0.91 <= hits / number <= 0.99


def test_equal_rows_differ_by_nothing_and_one_value_says_nothing():
    assert interval(np.zeros((3, 10))).low == interval(np.zeros((3, 10))).high == 0
    lone = interval(np.ones((1, 1)))
    assert lone.mean == 1 and lone.low is None and lone.standard_error is None


def test_the_order_of_seeds_and_the_scale_do_not_matter():
    table = np.random.default_rng(4).normal(size=(3, 40))
    found, scaled = interval(table), interval(10 * table)
    assert scaled.low == pytest.approx(10 * found.low)
    assert interval(table[::-1]).standard_error == pytest.approx(found.standard_error)
