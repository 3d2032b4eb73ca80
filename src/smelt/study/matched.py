"""Comparisons at equal cost: a loss against what another variant reaches for the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

NEAR = 0.02
"""Costs that differ by less than this share are called equal."""


@dataclass(frozen=True)
class Point:
    """A row as a point: what it costs and what it reaches."""

    id: str
    cost: float
    nats: float
    error: float | None  # standard error of nats


@dataclass(frozen=True)
class Match:
    """A point beside another variant at the same cost."""

    point: Point
    others: tuple[str, ...]  # rows the other loss is taken from
    how: str  # "picked" or "interpolated"
    nats: float  # of the other variant
    difference: float  # point − other: negative is better
    error: float | None  # standard error of the difference


def match(point: Point, others: Sequence[Point]) -> Match | None:
    """What the other variant reaches at the point's cost; None where its rows do not span it.

    A row whose cost is within 2 % is picked, the nearest of several. Else the loss is interpolated,
    linearly in log cost, between neighbours on the other's frontier: its rows that no cheaper row
    of its own equals. Nothing is extrapolated.
    """
    near = [one for one in others if abs(math.log(one.cost / point.cost)) <= NEAR]
    if near:
        best = min(near, key=lambda one: (abs(math.log(one.cost / point.cost)), one.id))
        return _match(point, [(best, 1.0)], "picked")
    edge = frontier(others)
    for low, high in pairwise(edge):
        if low.cost < point.cost < high.cost:
            share = math.log(point.cost / low.cost) / math.log(high.cost / low.cost)
            return _match(point, [(low, 1 - share), (high, share)], "interpolated")
    return None


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no point of at most their cost equals, cheapest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, one.nats, one.id)):
        if not found or point.nats < found[-1].nats:
            found.append(point)
    return found


def _match(point: Point, parts: Sequence[tuple[Point, float]], how: str) -> Match:
    nats = math.fsum(one.nats * share for one, share in parts)
    errors = [point.error, *(one.error for one, _ in parts)]
    error = None
    if all(one is not None for one in errors):
        squares = [(one.error or 0.0) ** 2 * share**2 for one, share in parts]
        error = math.sqrt(math.fsum([(point.error or 0.0) ** 2, *squares]))
    return Match(point, tuple(one.id for one, _ in parts), how, nats, point.nats - nats, error)
