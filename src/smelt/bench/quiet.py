"""Whether the machine left the measurements alone, and whether a model is large enough to measure.

Four signs of other work, each with a limit; one that is beyond it is said, and none is corrected
for. All are functions of numbers: nothing is measured here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import median, quantiles
from typing import Any

SPREAD = 0.05
"""Two runs' medians shall agree within this, by the turns of one run, 95 times of 100."""
WAITING = 0.05
"""Share of a step's time that one thread may not be on the processor."""
OTHERS = 0.1
"""Share of all cores that other processes may take."""
STEAL = 0.01
"""Share of the processors' time that the host may give to other machines."""
OVERHEAD = 0.5
"""Share of a step that may be what its checkpoint's cheapest step takes beyond its floor."""


@dataclass(frozen=True)
class Doubt:
    """How far the turns of one cell can be trusted."""

    spread: float | None  # of two runs' medians, as a share of them; None: too few turns to tell
    waiting: float | None  # share of the time off the processor; None: cannot be told


def doubt(wall: Sequence[float], processor: Sequence[float] | None) -> Doubt:
    """The doubt in some turns.

    The spread is 1.96·√2 standard errors of a median: 1.253·σ/√n, σ = IQR/1.349 (a few slow turns
    do not count). It knows the noise within a run only: a neighbour that comes for the second run
    cannot be seen in the first.

    Args:
        processor: seconds of one thread; None: of several, or not of this device.
    """
    spread = None
    if len(wall) >= 4:
        low, _, high = quantiles(wall, n=4, method="inclusive")
        sigma = (high - low) / 1.349
        spread = 1.96 * sqrt(2) * 1.253 * sigma / sqrt(len(wall)) / median(wall)
    waiting = None
    if processor is not None:
        waiting = median(
            max(0.0, 1 - own / all_of_it) for all_of_it, own in zip(wall, processor, strict=True)
        )
    return Doubt(spread, waiting)


@dataclass(frozen=True)
class Neighbours:
    """What else the machine did meanwhile; None: it does not say."""

    cores: int
    load_before: float | None
    load_after: float | None
    others: float | None  # share of all cores that other processes took
    steal: float | None  # share of all processors' time


@dataclass(frozen=True)
class Quiet:
    """The verdict on a run, and why."""

    is_quiet: bool
    reasons: tuple[str, ...]
    spread: float | None  # the largest of a cell
    waiting: float | None
    cells: int
    noisy_cells: int
    neighbours: Neighbours

    def to_dict(self) -> dict[str, Any]:
        """The verdict with its limits, as JSON holds it."""
        limits = {"spread": SPREAD, "waiting": WAITING, "others": OTHERS, "steal": STEAL}
        return asdict(self) | {"limits": limits}


def is_noisy(doubt: Doubt) -> bool:
    """Whether a cell is beyond a limit."""
    return (doubt.spread or 0) > SPREAD or (doubt.waiting or 0) > WAITING


def judge(doubts: Sequence[Doubt], neighbours: Neighbours) -> Quiet:
    """Whether a run was left alone."""
    spread = max((d.spread for d in doubts if d.spread is not None), default=None)
    waiting = max((d.waiting for d in doubts if d.waiting is not None), default=None)
    reasons = []
    if spread is not None and spread > SPREAD:
        many = sum((d.spread or 0) > SPREAD for d in doubts)
        reasons.append(
            f"turns vary: by them two runs' medians differ by up to {spread:.0%} (limit "
            f"{SPREAD:.0%}; {many} of {len(doubts)} cells)"
        )
    if waiting is not None and waiting > WAITING:
        many = sum((d.waiting or 0) > WAITING for d in doubts)
        reasons.append(
            f"steps wait for the processor up to {waiting:.0%} of their time (limit {WAITING:.0%}; "
            f"{many} of {len(doubts)} cells)"
        )
    if neighbours.others is not None and neighbours.others > OTHERS:
        busy = neighbours.others * neighbours.cores
        reasons.append(
            f"other processes kept {busy:.1f} of {neighbours.cores} cores busy (limit {OTHERS:.0%})"
        )
    if neighbours.steal is not None and neighbours.steal > STEAL:
        reasons.append(f"the host took {neighbours.steal:.0%} of the time (limit {STEAL:.0%})")
    return Quiet(
        is_quiet=not reasons,
        reasons=tuple(reasons),
        spread=spread,
        waiting=waiting,
        cells=len(doubts),
        noisy_cells=sum(map(is_noisy, doubts)),
        neighbours=neighbours,
    )


@dataclass(frozen=True)
class Span:
    """A cell's time and floor by one clock, in milliseconds."""

    cell: str
    ms: float
    floor_ms: float
    unit: str = "ms"


def too_small(cells: Mapping[str, Sequence[Span]]) -> list[str]:
    """A sentence for each checkpoint whose steps are mostly overhead: where, and what it means.

    Overhead is what bytes and FLOPs do not explain in the cell where that is least: every step has
    as much of it. (In larger cells a kernel below the machine's best may leave more unexplained;
    that grows with the work, and is not counted.)
    """
    found = []
    for checkpoint, own in cells.items():
        fixed = min((max(0.0, one.ms - one.floor_ms) for one in own), default=0.0)
        mostly = [one for one in own if fixed > OVERHEAD * one.ms]
        if mostly:
            worst = min(mostly, key=lambda one: one.ms)
            found.append(
                f"{checkpoint}: too small for {len(mostly)} of {len(own)} cells. {worst.cell} "
                f"takes {worst.ms:.3g} {worst.unit}, of which bytes and FLOPs explain "
                f"{worst.floor_ms:.3g}; {fixed:.3g} (Python, launches, small operations) are in "
                "every step. There fewer bytes or FLOPs hardly show as less time, and a larger "
                "model will not behave alike: compare bytes and FLOPs."
            )
    return found
