"""Which learning rates are tried, and which of them is taken: the same effort for every variant."""

import math
from collections.abc import Mapping, Sequence


def extended(
    rates: Sequence[float], found: Mapping[str, Mapping[float, float]], extensions: int
) -> list[float]:
    """The rates that every variant is tried at, given what was found so far.

    If a variant's best rate is the lowest or the highest, one more at that end, by the ratio of the
    two rates there, is tried by all variants: so all have had the same number of trials.

    Args:
        rates: the first grid, ascending.
        found: per variant, held-out nats by rate; of rates outside the first grid too.
        extensions: at each end, at most.
    """
    grid = list(rates)
    added = [0, 0]
    while True:
        complete = [nats for nats in found.values() if all(rate in nats for rate in grid)]
        if len(complete) < len(found) or not found:
            return grid
        chosen = [best(nats, grid) for nats in complete]
        low = added[0] < extensions and any(rate == grid[0] for rate in chosen)
        high = added[1] < extensions and any(rate == grid[-1] for rate in chosen)
        if not low and not high:
            return grid
        first, last = _next(grid[0], grid[1]), _next(grid[-1], grid[-2])
        grid = [first] * low + grid + [last] * high
        added = [added[0] + low, added[1] + high]


def best(nats: Mapping[float, float], rates: Sequence[float]) -> float | None:
    """The rate with the lowest held-out nats, the lower rate of two equal ones.

    None: no rate has a finite loss.
    """
    finite = [rate for rate in sorted(rates) if math.isfinite(nats[rate])]
    return min(finite, key=lambda rate: nats[rate], default=None)


def _next(edge: float, inner: float) -> float:
    """The rate beyond an edge, in the same ratio; rounded, so that it is the same in every name."""
    return float(f"{edge * edge / inner:.6g}")
