"""Laws of what seeds can tell, against scipy, published values and exact curves."""

import math

import numpy as np
import pytest
from scipy import stats

from smelt.study.statistics import (
    PowerLaw,
    detectable,
    fit_log_plane,
    fit_power_law,
    paired,
    pooled,
    seeds_needed,
    summary,
)


@pytest.fixture
def draws():
    return np.random.default_rng(5).normal(3.2, 0.01, (2, 5))


FEW = (0.01, -0.02, 0.015, -0.005, 0.0, 0.01)  # noise of a run


def test_a_paired_difference_is_scipys_paired_t_test(draws):
    a, b = draws
    found = paired(dict(enumerate(a)), dict(enumerate(b)))
    other = stats.ttest_rel(a, b)
    assert found.mean == pytest.approx(np.mean(a - b))
    assert found.p == pytest.approx(other.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(other.confidence_interval()))


def test_only_seeds_that_both_have_are_paired():
    found = paired({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.5, 0: 0.5, 9: -100.0})
    assert (found.n, found.mean, found.sd) == (2, 0.5, 0.0)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_a_mean_and_no_interval():
    assert summary([2.0]).sd is None and summary([2.0]).standard_error is None
    found = paired({3: 1.0}, {3: 0.25})
    assert (found.mean, found.sd, found.low, found.p) == (0.75, None, None, None)


def test_equal_differences_leave_no_doubt():
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert paired({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0}).p == 0.0


def test_the_pooled_deviation_is_the_residual_one_of_an_analysis_of_variance():
    groups = [[1.0, 2.0, 4.0], [10.0, 10.5], [7.0]]
    found = pooled(groups)
    squares = sum(((np.array(g) - np.mean(g)) ** 2).sum() for g in groups)
    assert found.freedom == 3
    assert found.sd == pytest.approx(math.sqrt(squares / 3))
    assert found.low < found.sd < found.high
    assert pooled([[1.0], [2.0]]) is None


def test_the_interval_of_a_pooled_deviation_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        found = pooled(generator.normal(0, 1, (3, 4)).tolist())
        hits += found.low < 1 < found.high
    assert 0.93 < hits / 1000 < 0.97


@pytest.mark.parametrize(
    ("effect", "n", "is_paired"),
    [(0.5, 64, False), (0.8, 26, False), (0.5, 34, True), (0.8, 15, True)],
)
def test_the_sizes_of_cohens_tables_are_found(effect, n, is_paired):
    # Cohen 1988, tables 2.4.1; G*Power for the paired ones: 5 % two-sided, power 80 %.
    assert seeds_needed(1.0, effect, is_paired=is_paired) == n


@pytest.mark.parametrize("is_paired", [True, False])
@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_smallest_effect_is_found_in_four_of_five_experiments(n, is_paired):
    generator = np.random.default_rng(n)
    effect = detectable(2.0, n, is_paired=is_paired)
    a = generator.normal(effect, 2.0, (40_000, n))
    if is_paired:
        p = stats.ttest_1samp(a, 0, axis=1).pvalue
    else:
        p = stats.ttest_ind(a, generator.normal(0, 2.0, (40_000, n)), axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_the_smallest_effect_scales_with_the_noise_and_falls_with_seeds():
    effects = [detectable(0.01, n, is_paired=True) for n in range(2, 21)]
    assert effects == sorted(effects, reverse=True)
    assert detectable(0.03, 7, is_paired=True) == pytest.approx(
        3 * detectable(0.01, 7, is_paired=True)
    )


def test_the_seeds_needed_are_the_fewest_that_resolve_the_effect():
    for effect in (0.02, 0.004, 0.001):
        n = seeds_needed(0.005, effect, is_paired=False)
        assert detectable(0.005, n, is_paired=False) <= effect
        assert n == 2 or detectable(0.005, n - 1, is_paired=False) > effect


def test_an_exact_power_law_is_found_again():
    x = [3e5, 7e5, 1.2e6, 4e6, 9e6]
    found = fit_power_law(x, [2.5 + 0.8 * (one / 1e6) ** -0.4 for one in x])
    assert found.floor == pytest.approx(2.5, abs=1e-5)
    assert found.exponent == pytest.approx(0.4, abs=1e-5)
    assert found.at(2e6) == pytest.approx(2.5 + 0.8 * 2**-0.4, abs=1e-6)
    assert found.rms < 1e-6 and max(map(abs, found.residuals)) < 1e-6


def test_residuals_are_what_the_law_does_not_say():
    x, noise = [1.0, 2.0, 4.0, 8.0, 16.0], [0.01, -0.02, 0.015, -0.005, 0.0]
    y = [3 + one**-0.5 + e for one, e in zip(x, noise, strict=True)]
    found = fit_power_law(x, y)
    for one, value, residual in zip(x, y, found.residuals, strict=True):
        assert value - found.at(one) == pytest.approx(residual, abs=1e-9)


def test_points_without_a_trend_determine_no_law():
    x = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    flat = fit_power_law(x, [3.0, 3.1, 2.95, 3.05, 2.98, 3.06])
    assert flat is not None and not flat.is_determined
    nearly = PowerLaw(3.5, 1e-9, 1e-9, 1.0, (1e4, 1e4, 1e-20), (), 0.1)  # as code's were
    assert not nearly.is_determined
    falling = fit_power_law(x, [3 + 2 * one**-0.5 + e for one, e in zip(x, FEW, strict=True)])
    assert falling is not None and falling.is_determined


def test_three_sizes_make_no_law_of_three_parameters():
    assert fit_power_law([1.0, 2.0, 4.0, 4.0], [3.0, 2.0, 1.5, 1.4]) is None


def test_an_exact_plane_of_logs_is_found_again():
    sizes = [(D, E) for D in (64, 96) for E in (4, 8, 16)]
    y = [5.0 * D**-0.1 * E**-0.03 for D, E in sizes]
    found = fit_log_plane(sizes, y)
    assert found.slopes == pytest.approx((-0.1, -0.03))
    assert found.rms < 1e-9


def test_a_plane_needs_every_size_to_vary_and_a_point_to_spare():
    assert fit_log_plane([(64, 4), (64, 8), (64, 16), (64, 32)], [4, 3, 2, 1]) is None
    assert fit_log_plane([(64, 4), (96, 8), (64, 16)], [4, 3, 2]) is None
