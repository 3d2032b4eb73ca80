"""Merge or quantise? The answer follows the numbers, and can be either."""

import pytest
import torch

from smelt.evaluate.matched_bytes import Point, at_bytes, best_by_bytes, merge_or_quantise
from smelt.evaluate.sequences import PerSequence

NOISE = torch.tensor([0.01, -0.01, 0.02, -0.02], dtype=torch.float64)


def point(name: str, num_bytes: int, nats: float, *, merged: bool = False, noise: float = 1.0):
    """A file whose loss is so many nats on each of two texts of four sequences of 100 tokens."""
    total = 100 * (nats + noise * NOISE * (1.0 if merged else -1.0))
    loss = PerSequence(total, torch.full((4,), 100))
    return Point(name, num_bytes, merged, "Q8_0", (loss, loss))


ORIGINAL = point("original", 1000, 3.0)


def test_the_front_is_what_nothing_as_small_is_better_than():
    q4, q8 = point("q4", 300, 3.1), point("q8", 500, 3.01)
    bad, small = point("bad", 600, 3.2, merged=True), point("small", 100, 3.5, merged=True)
    found = best_by_bytes([ORIGINAL, q4, q8, bad, small])
    assert [p.name for p in found] == ["small", "q4", "q8", "original"]


def test_of_equal_bytes_only_the_best_is_on_the_front():
    one, two = point("one", 500, 3.2), point("two", 500, 3.1)
    assert [p.name for p in best_by_bytes([ORIGINAL, one, two])] == ["two", "original"]


def test_at_equal_bytes_the_rival_lies_between_its_neighbours():
    plain = [point("q4", 300, 3.1), point("q8", 500, 3.0), ORIGINAL]
    between = at_bytes(plain, 450)
    assert between.num_bytes == 450
    assert between.nats_over(ORIGINAL) == pytest.approx(0.025)
    assert at_bytes(plain, 300) is plain[0] and at_bytes(plain, 500) is plain[1]
    assert at_bytes(plain, 10) is plain[0] and at_bytes(plain, 2000) is plain[2]


def test_a_smaller_file_that_is_better_too_beats_the_smallest_unmerged_one():
    points = [ORIGINAL, point("q2", 200, 3.3), point("half q4", 150, 3.1, merged=True)]
    found = merge_or_quantise(points)
    assert [(a.name, b.name) for a, b in found.better] == [("half q4", "q2")]
    assert found.sentence.startswith("Yes")
    assert "takes 25% less and predicts better by 0.2000 nats" in found.sentence


def test_it_says_no_where_every_merged_file_loses():
    points = [
        ORIGINAL,
        point("q8", 500, 3.0),
        point("q4", 300, 3.05),
        point("half", 550, 3.3, merged=True),
        point("half q8", 310, 3.31, merged=True),
        point("half q4", 170, 3.4, merged=True),
    ]
    found = merge_or_quantise(points)
    assert [(a.name, b.name) for a, b in found.worse] == [
        ("half", "q8"),
        ("half q8", "between q4 and q8"),
    ]
    assert not found.better
    assert found.sentence.startswith("No, at equal bytes merging does not beat quantisation")
    assert [p.name for p in found.smaller] == ["half q4"]
    assert "half q4 takes 43% less for 0.3500 nats more" in found.sentence


def test_it_says_yes_where_every_merged_file_wins():
    points = [
        ORIGINAL,
        point("q4", 300, 3.5),
        point("half", 550, 3.1, merged=True),
        point("half q8", 310, 3.1, merged=True),
    ]
    found = merge_or_quantise(points)
    assert found.sentence.startswith("Yes, at equal bytes merging beats quantisation")
    assert "half q8 against between q4 and original, 0.3929" in found.sentence
    assert "It adds nothing" in found.sentence  # no merged file is below the smallest


def test_it_says_in_part_where_some_win():
    points = [
        ORIGINAL,
        point("q8", 500, 3.0),
        point("q2", 200, 4.0),
        point("half", 550, 3.1, merged=True),
        point("half q4", 250, 3.2, merged=True),
    ]
    found = merge_or_quantise(points)
    assert found.sentence.startswith("In part, at equal bytes merging beats quantisation")
    assert [a.name for a, _ in found.better] == ["half q4"]


def test_a_difference_within_the_noise_is_none():
    points = [ORIGINAL, point("q8", 500, 3.0), point("half", 550, 2.999, merged=True)]
    found = merge_or_quantise(points)
    assert [a.name for a, _ in found.level] == ["half"]
    assert not found.better and not found.worse


def test_the_error_of_two_texts_is_smaller_than_of_one():
    a, b = point("a", 1, 3.1, merged=True), point("b", 1, 3.0)
    mean, error = a.difference(b)
    assert mean == pytest.approx(0.1)
    one = Point("a", 1, True, "", a.loss[:1]).difference(Point("b", 1, False, "", b.loss[:1]))
    assert error == pytest.approx(one[1] / 2**0.5)
