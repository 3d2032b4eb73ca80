"""Merge or quantise? Files of one model held against each other at equal bytes.

A file is a point: its bytes, and the loss it has more than the original. The question is answered
by the points alone, with the standard error of the difference of each pair, sequence by sequence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smelt.evaluate.front import front
from smelt.evaluate.sequences import PerSequence

SURE = 2.0
"""Standard errors that a difference has to be beyond, to be called one."""


@dataclass(frozen=True)
class Point:
    """One file: what it is, what it takes, what it lost."""

    name: str
    num_bytes: int
    is_merged: bool  # fewer experts than the original
    scheme: str  # BF16, Q8_0, Q4_K …
    loss: tuple[PerSequence, ...]  # nats, on each text

    def nats_over(self, original: "Point") -> float:
        """Nats per token more than the original, the mean of the texts."""
        pairs = zip(self.loss, original.loss, strict=True)
        return sum(mine.minus(its).mean for mine, its in pairs) / len(self.loss)

    def difference(self, other: "Point") -> tuple[float, float]:
        """Nats per token more than another file, mean of the texts, and its standard error."""
        gaps = [mine.minus(its) for mine, its in zip(self.loss, other.loss, strict=True)]
        errors = [gap.standard_error or math.inf for gap in gaps]
        mean = sum(gap.mean for gap in gaps) / len(gaps)
        return mean, math.sqrt(sum(error**2 for error in errors)) / len(gaps)


def best_by_bytes(points: Sequence[Point]) -> list[Point]:
    """The points that no other is as small as and better than; by bytes, of equal ones the first.

    Args:
        points: what they lose is held against the first.
    """
    nats = {id(point): point.nats_over(points[0]) for point in points}

    def place(point: Point) -> tuple[float, float]:
        return point.num_bytes, nats[id(point)]

    found = {place(point): point for point in reversed(front(points, place))}
    return [found[at] for at in sorted(found)]


@dataclass(frozen=True)
class Verdict:
    """What the points say of merging and quantising."""

    better: tuple[tuple[Point, Point], ...]  # a merged file, and what it beats at its bytes
    worse: tuple[tuple[Point, Point], ...]
    level: tuple[tuple[Point, Point], ...]  # neither is surely better
    smaller: tuple[Point, ...]  # merged files below the smallest unmerged one, on the front
    sentence: str


def merge_or_quantise(points: Sequence[Point]) -> Verdict:
    """At equal bytes, does merging beat quantisation, or add to it?

    Every merged file is held against unmerged files at its own bytes: what lies on the line between
    the two neighbours of their front, as a file of both types would, more or less. Those smaller
    than all unmerged files are held against the smallest one: they can beat it, and otherwise say
    what merging adds, and at what price.

    Args:
        points: the first is the original; unmerged and merged files.
    """
    original = points[0]
    plain = best_by_bytes([p for p in points if not p.is_merged])
    least = plain[0]
    found: dict[str, list[tuple[Point, Point]]] = {"better": [], "worse": [], "level": []}
    for merged in (p for p in points if p.is_merged):
        rival = at_bytes(plain, merged.num_bytes)
        mean, error = merged.difference(rival)
        kind = "level" if abs(mean) <= SURE * error else "better" if mean < 0 else "worse"
        if merged.num_bytes >= least.num_bytes or kind == "better":
            found[kind].append((merged, rival))
    smaller = [p for p in best_by_bytes(points) if p.is_merged and p.num_bytes < least.num_bytes]
    sentence = f"{_beats(found, least)} {_adds(smaller, least, original)}"
    return Verdict(
        tuple(found["better"]),
        tuple(found["worse"]),
        tuple(found["level"]),
        tuple(smaller),
        sentence,
    )


def at_bytes(plain: Sequence[Point], num_bytes: int) -> Point:
    """The unmerged file of so many bytes: between two neighbours, or the nearest end.

    Args:
        plain: the front of the unmerged files, by bytes.
    """
    above = next((i for i, p in enumerate(plain) if p.num_bytes >= num_bytes), len(plain))
    if above == 0:
        return plain[0]
    if above == len(plain):
        return plain[-1]
    low, high = plain[above - 1], plain[above]
    share = (num_bytes - low.num_bytes) / (high.num_bytes - low.num_bytes)
    if share == 1:
        return high
    loss = [
        PerSequence((1 - share) * a.total + share * b.total, a.count)
        for a, b in zip(low.loss, high.loss, strict=True)
    ]
    name = f"between {low.name} and {high.name}"
    return Point(name, num_bytes, False, f"{low.scheme}–{high.scheme}", tuple(loss))


def _beats(found: dict[str, list[tuple[Point, Point]]], least: Point) -> str:
    total = sum(map(len, found.values()))
    if not total:
        return f"No merged file is as large as the smallest unmerged one ({least.name})."
    counts = (
        f"of {total} merged files, each against unmerged ones at its own bytes, "
        f"{len(found['better'])} predict better, {len(found['worse'])} worse, "
        f"{len(found['level'])} within {SURE:g} standard errors"
    )
    if not found["better"]:
        return f"No, at equal bytes merging does not beat quantisation: {counts}."
    best, rival = min(found["better"], key=lambda pair: pair[0].difference(pair[1])[0])
    word = "Yes" if not found["worse"] else "In part"
    gain, error = best.difference(rival)
    return (
        f"{word}, at equal bytes merging beats quantisation: {counts} (most: {best.name} against "
        f"{rival.name}, {-gain:.4f} ± {error:.4f} nats)."
    )


def _adds(smaller: Sequence[Point], least: Point, original: Point) -> str:
    if not smaller:
        return "It adds nothing to it: no merged file is smaller than every unmerged one."
    best = max(smaller, key=lambda p: p.num_bytes)
    less = 1 - best.num_bytes / least.num_bytes
    more = best.nats_over(least)
    price = f"for {more:.4f} nats more" if more > 0 else f"and predicts better by {-more:.4f} nats"
    ends = f"{least.num_bytes / 1e6:.1f} MB, where the narrowest unmerged file ends"
    return (
        f"It adds to it below {ends} ({least.name}, {least.nats_over(original):+.4f} nats): "
        f"{best.name} takes {less:.0%} less {price}."
    )
