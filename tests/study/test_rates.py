"""Laws of the learning-rate search: the same effort for every variant."""

import math

from smelt.study.rates import best, extended

GRID = [0.002, 0.004, 0.008]


def found(*rows, grid=GRID):
    return {f"v{i}": dict(zip(grid, row, strict=True)) for i, row in enumerate(rows)}


def test_a_best_rate_inside_the_grid_ends_the_search():
    assert extended(GRID, found((3, 2, 4), (5, 4, 5)), 1) == GRID


def test_one_variants_best_at_an_edge_adds_a_rate_for_all():
    assert extended(GRID, found((3, 2, 4), (5, 4, 3)), 1) == [*GRID, 0.016]
    assert extended(GRID, found((1, 2, 4), (5, 4, 3)), 1) == [0.001, *GRID, 0.016]


def test_nothing_is_added_before_every_variant_was_tried_at_every_rate():
    nats = found((3, 2, 1), (5, 4, 3))
    del nats["v1"][0.004]
    assert extended(GRID, nats, 1) == GRID


def test_the_extensions_of_each_end_are_counted():
    nats = found((4, 3, 2), (5, 4, 3))
    for one in nats.values():
        one |= {0.016: 1.0, 0.032: 0.5}
    assert extended(GRID, nats, 1) == [*GRID, 0.016]
    assert extended(GRID, nats, 2) == [*GRID, 0.016, 0.032]


def test_a_rate_that_diverged_is_never_the_best():
    nats = {0.002: 3.0, 0.004: math.inf, 0.008: math.inf}
    assert best(nats, GRID) == 0.002
    assert best(dict.fromkeys(GRID, math.inf), GRID) is None
    assert extended(GRID, {"v": dict.fromkeys(GRID, math.inf)}, 1) == GRID


def test_the_lower_of_two_equal_rates_is_taken():
    assert best({0.002: 3.0, 0.004: 2.0, 0.008: 2.0}, GRID) == 0.004
