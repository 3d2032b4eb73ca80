"""What checkpoints cost beside how good they are, and which of them nothing beats."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import variance

from smelt.bench.file import Bench
from smelt.bench.records import CheckpointCost
from smelt.errors import RecipeError
from smelt.evaluate.front import front
from smelt.report.material import Material
from smelt.report.quality import Parts, Quality

COSTS = {
    "bytes": ("bytes on disk", "B"),
    "memory": ("peak memory", "B"),
    "flops": ("FLOPs per token", "FLOP"),
    "decode": ("decode time per step", "ms"),
}
"""By key: what it is called, and its unit."""


@dataclass(frozen=True)
class Point:
    """A checkpoint in a figure of quality against one cost."""

    fingerprint: str
    cost: float
    value: float
    error: float | None  # standard error of the value
    parts: Parts = ()

    def error_of_difference(self, other: "Point") -> float | None:
        """Standard error of the difference of two values: by pairs of parts, where both say them.

        Otherwise as of independent samples, which is too large where both saw the same items.
        """
        sizes = [len(sample) for sample in self.parts]
        if sizes and min(sizes) > 1 and sizes == [len(sample) for sample in other.parts]:
            samples = zip(self.parts, other.parts, strict=True)
            pairs = [[a - b for a, b in zip(*both, strict=True)] for both in samples]
            return math.sqrt(math.fsum(len(each) * variance(each) for each in pairs))
        if self.error is None or other.error is None:
            return None
        return math.hypot(self.error, other.error)


@dataclass(frozen=True)
class Costs:
    """Costs by key and fingerprint, and how the decode times were taken."""

    by_key: Mapping[str, Mapping[str, float]]
    decode_at: tuple[int, int] | None = None  # batch and context
    predicted: frozenset[str] = field(default_factory=frozenset)  # bytes from a plan, not a disk


def read_costs(material: Material) -> Costs:
    """What is known of each checkpoint's costs: from bench files, then folders, then plans.

    Raises:
        RecipeError: decode times of different machines or settings, which do not compare.
    """
    found: dict[str, dict[str, float]] = {key: {} for key in COSTS}
    predicted = set()
    for run in material.runs:
        if run.plan is not None:
            found["bytes"].setdefault(run.plan.checkpoint, run.plan.predicted.bytes_before)
            predicted.add(run.plan.checkpoint)
    for run in material.runs:
        if run.fingerprint is not None and run.num_bytes is not None:
            found["bytes"][run.fingerprint] = run.num_bytes
            predicted.discard(run.fingerprint)
    for bench in material.benches:
        for cost in bench.checkpoints:
            _take(found, cost)
            predicted.discard(cost.fingerprint)
    at, times = _decode(material.benches)
    found["decode"] = times
    return Costs(found, at, frozenset(predicted))


def _take(found: dict[str, dict[str, float]], cost: CheckpointCost) -> None:
    values = {
        "bytes": cost.folder_bytes,
        "memory": cost.peak_memory_bytes,
        "flops": cost.flops_per_token,
    }
    for key, value in values.items():
        if value is not None:
            found[key][cost.fingerprint] = float(value)


def _decode(benches: Sequence[Bench]) -> tuple[tuple[int, int] | None, dict[str, float]]:
    """The setting that most checkpoints were timed at (the smallest of them), and its times."""
    check_machines(benches)
    steps = [step for bench in benches for step in bench.decode]
    if not steps:
        return None, {}
    held: dict[tuple[int, int], dict[str, float]] = {}
    for step in steps:
        held.setdefault((step.batch, step.context), {})[step.fingerprint] = step.ms_median
    most = max(len(times) for times in held.values())
    at = min(key for key, times in held.items() if len(times) == most)
    return at, held[at]


def check_machines(benches: Sequence[Bench]) -> None:
    """Refuse decode times of several machines, types or numbers of threads in one figure."""
    grounds: dict[tuple[str, ...], Bench] = {}
    for bench in benches:
        if bench.decode:
            grounds.setdefault(_ground(bench), bench)
    if len(grounds) > 1:
        first, second, *_ = grounds
        words = "; ".join(" / ".join(map(str, ground)) for ground in (first, second))
        raise RecipeError(
            f"The bench files hold decode times of different machines or settings ({words}), which "
            "do not compare. Measure all checkpoints in one `smelt bench`, or make a report of "
            "each file."
        )


def _ground(bench: Bench) -> tuple[str, ...]:
    machine = bench.machine
    threads = sorted({str(step.threads) for step in bench.decode})
    kinds = sorted({(step.dtype, step.device) for step in bench.decode})
    names = [str(machine[key]) for key in ("processor", "gpu") if machine.get(key)]
    name = ", ".join(names) or "unknown machine"
    of_steps = [", ".join(dict.fromkeys(words)) for words in zip(*kinds, strict=True)]
    return (name, f"{', '.join(threads)} threads", *of_steps)


def points(quality: Quality, costs: Mapping[str, float]) -> list[Point]:
    """The checkpoints whose quality and cost are both known, the cheapest first."""
    both = [f for f in quality.values if f in costs]
    found = [Point(f, costs[f], *quality.values[f], quality.parts.get(f, ())) for f in both]
    return sorted(found, key=lambda one: one.cost)


def best_by_cost(found: Sequence[Point], *, is_lower_better: bool) -> list[Point]:
    """The points that no other beats: none is as good at less cost, or better at no more."""
    sign = 1 if is_lower_better else -1
    return front(found, lambda one: (one.cost, sign * one.value))


def beaten_by(one: Point, found: Sequence[Point], *, is_lower_better: bool) -> Point | None:
    """The best of the points that beat one: no dearer, and the best of those; None: on the front.

    By how much, and whether that is more than chance, is for the caller to say.
    """
    on_front = best_by_cost(found, is_lower_better=is_lower_better)
    if one in on_front:
        return None
    cheaper = [other for other in on_front if other.cost <= one.cost]
    sign = 1 if is_lower_better else -1
    return min(cheaper, key=lambda other: (sign * other.value, other.cost))
