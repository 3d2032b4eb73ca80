"""Laws of comparing at equal cost."""

import math

import pytest

from smelt.study.matched import Point, frontier, match


def points(*pairs, error=0.01):
    return [Point(f"r{i}", cost, nats, error) for i, (cost, nats) in enumerate(pairs)]


def test_a_row_of_the_same_cost_is_picked():
    found = match(Point("a", 1000, 3.0, 0.01), points((500, 3.3), (1010, 3.1), (995, 3.2)))
    assert (found.how, found.others, found.nats) == ("picked", ("r2",), 3.2)
    assert found.difference == pytest.approx(-0.2)
    assert found.error == pytest.approx(math.hypot(0.01, 0.01))


def test_between_two_rows_the_loss_goes_linearly_in_log_cost():
    found = match(Point("a", 2000, 3.0, 0.01), points((1000, 3.4), (4000, 3.0)))
    assert (found.how, found.others) == ("interpolated", ("r0", "r1"))
    assert found.nats == pytest.approx(3.2)
    assert found.error == pytest.approx(math.sqrt(1e-4 + 2 * (0.5 * 0.01) ** 2))


@pytest.mark.parametrize("cost", [900, 4200])
def test_nothing_is_extrapolated(cost):
    assert match(Point("a", cost, 3.0, None), points((1000, 3.4), (4000, 3.0))) is None


def test_a_row_that_a_cheaper_one_equals_is_not_on_the_frontier():
    found = frontier(points((3, 2.0), (1, 3.0), (2, 3.0), (5, 1.0), (4, 2.5)))
    assert [point.cost for point in found] == [1, 3, 5]


def test_without_errors_there_is_no_error():
    assert match(Point("a", 1, 3.0, 0.1), points((1, 3.4), error=None)).error is None
