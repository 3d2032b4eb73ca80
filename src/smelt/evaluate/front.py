"""The points that no other beats, by what they cost and what they lose."""

from collections.abc import Callable, Sequence
from typing import TypeVar

PointT = TypeVar("PointT")


def front(points: Sequence[PointT], place: Callable[[PointT], tuple[float, float]]) -> list[PointT]:
    """Those of which none is as good at less cost, or better at no more; in the order given.

    Equal points are all on the front.

    Args:
        points: any.
        place: a point's cost and its loss; less of either is better.
    """
    places = [place(point) for point in points]

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    return [
        point
        for point, own in zip(points, places, strict=True)
        if not any(beats(other, own) for other in places)
    ]
