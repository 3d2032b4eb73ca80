"""The front, and what beats what is not on it."""

from collections.abc import Sequence
from statistics import stdev, variance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.bench.file import Bench
from smelt.bench.records import DecodeStep
from smelt.errors import RecipeError
from smelt.report.costs import Point, beaten_by, best_by_cost, check_machines

_VALUES = st.tuples(st.integers(0, 6), st.integers(0, 6))


def points(pairs: list[tuple[int, int]]) -> list[Point]:
    return [Point(str(i), float(c), float(v), None) for i, (c, v) in enumerate(pairs)]


def is_beaten(one: Point, others: list[Point], *, lower: bool) -> bool:
    """By the definition, slowly: somebody is no worse in both and better in one."""
    sign = 1 if lower else -1
    return any(
        other.cost <= one.cost
        and sign * other.value <= sign * one.value
        and (other.cost < one.cost or sign * other.value < sign * one.value)
        for other in others
    )


@given(st.lists(_VALUES, max_size=9), st.booleans())
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]], lower: bool) -> None:
    found = points(pairs)
    kept = best_by_cost(found, is_lower_better=lower)
    assert kept == [one for one in found if not is_beaten(one, found, lower=lower)]


@given(st.lists(_VALUES, max_size=9), st.booleans())
def test_what_is_beaten_names_one_on_the_front_that_is_no_worse_in_both(
    pairs: list[tuple[int, int]], lower: bool
) -> None:
    found = points(pairs)
    kept = best_by_cost(found, is_lower_better=lower)
    for one in found:
        other = beaten_by(one, found, is_lower_better=lower)
        assert (other is None) == (one in kept)
        if other is not None:
            assert other in kept and other.cost <= one.cost
            assert other.value <= one.value if lower else other.value >= one.value


def test_decode_times_of_two_machines_are_not_held_against_each_other() -> None:
    def bench(processor: str, threads: int = 1) -> Bench:
        step = DecodeStep(
            checkpoint="a",
            fingerprint="f",
            batch=1,
            context=0,
            steps=1,
            dtype="float32",
            device="cpu",
            threads=threads,
            turns=1,
            ms=1.0,
            ms_median=1.0,
            processor_ms=1.0,
        )
        return Bench({"processor": processor}, None, None, {}, decode=[step])

    check_machines([bench("one"), bench("one")])
    with pytest.raises(RecipeError, match="different machines"):
        check_machines([bench("one"), bench("another")])
    with pytest.raises(RecipeError, match="one / 1 threads / float32 / cpu; one / 2 threads"):
        check_machines([bench("one"), bench("one", 2)])


def test_a_difference_on_the_same_sequences_is_better_known_than_on_others() -> None:
    texts = [1.0, 3.0, 2.0, 6.0]
    one = Point("a", 1.0, 12.0, 4.3, (tuple(texts),))
    more = [0.1, 0.0, 0.2, 0.1]
    other = Point("b", 1.0, 12.4, 4.3, (tuple(map(sum, zip(texts, more, strict=True))),))
    spread = pytest.approx(4**0.5 * stdev(more))
    assert one.error_of_difference(other) == other.error_of_difference(one) == spread
    alone = Point("c", 1.0, 12.4, 4.3)
    assert one.error_of_difference(alone) == pytest.approx(4.3 * 2**0.5)
    assert one.error_of_difference(Point("d", 1.0, 12.0, None)) is None


def test_each_task_has_a_spread_of_its_own() -> None:
    """Of two tasks: the mean of independent differences, whatever lies between the tasks."""
    few, many = [1, 0, 1, 1], [0, 0, 1, 0, 1, 0, 0, 0]
    changed = [1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 1, 0]

    def point(name: str, tasks: Sequence[list[int]]) -> Point:
        parts = tuple(tuple(x / (2 * len(own)) for x in own) for own in tasks)
        return Point(name, 1.0, sum(map(sum, parts)), 9.9, parts)

    one, other = point("a", (few, many)), point("b", changed)
    squares = [
        variance([x - y for x, y in zip(*both, strict=True)]) / len(both[0])
        for both in zip((few, many), changed, strict=True)
    ]
    assert one.error_of_difference(other) == pytest.approx(sum(squares) ** 0.5 / 2)
    shorter = point("c", (few, many[1:]))
    assert one.error_of_difference(shorter) == pytest.approx(9.9 * 2**0.5)
