"""Cells of a measurement, and models that take turns in them.

A cell is one model at one setting. All models of a setting take turns, so that what else the
machine does falls on all alike.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from smelt.bench.clock import Times
from smelt.bench.floors import Floors, floors
from smelt.bench.flops import executed
from smelt.bench.quiet import Doubt, doubt
from smelt.bench.reached import how_often, reached
from smelt.bench.roofline import Roofline
from smelt.bench.subjects import Subject
from smelt.bench.traffic import Seen, Work
from smelt.errors import RecipeError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How measurements are made, whatever is measured."""

    turns: int = 5
    skip_alpha: tuple[float, ...] = ()  # each SaMoE model is measured at these thresholds too
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    seed: int = 0


class Cell(Protocol):
    """One model at one setting."""

    def count(self) -> None:
        """See once what cannot be timed: experts reached, FLOPs executed."""
        ...

    def turn(self) -> None:
        """Measure once."""
        ...

    def release(self) -> None:
        """Give up what was held to measure with."""
        ...


CellT = TypeVar("CellT", bound=Cell)


def take_turns(
    groups: Sequence[tuple[str, Callable[[], list[CellT]]]],
    turns: int,
    roofline: Roofline,
    progress: Progress | None = None,
) -> list[CellT]:
    """The cells of every group, measured: cell by cell in each turn, the machine before them.

    Raises:
        RecipeError: a group's cells do not fit the memory.
    """
    measured: list[CellT] = []
    total, done = len(groups) * turns, 0
    for title, make in groups:
        with _enough_memory(title):
            cells = make()
            for turn in range(turns):
                if turn == 0:
                    for cell in cells:
                        cell.count()
                roofline.turn()
                for cell in cells:
                    cell.turn()
                done += 1
                if progress is not None:
                    progress(title, done, total)
            for cell in cells:
                cell.release()
            measured += cells
    return measured


def see(subject: Subject, jobs: Sequence[Callable[[], object]], cached: float) -> Seen | None:
    """What these calls reach, on average, and the FLOPs of the last; None: unknown experts."""
    if subject.layers is None:
        return None
    with reached(subject.model, subject.layers) as calls:
        for job in jobs:
            job()
    hit = how_often(calls, subject.num_stored(calls))
    names = [layer.experts for layer in subject.layers]
    total, inside = executed(subject.model, jobs[-1], names)
    return Seen(hit, cached, total, inside)


@dataclass(frozen=True)
class Held:
    """Times held against what the machine needs at least."""

    work: Work
    wall: Floors
    processor: Floors | None  # of a CPU


def hold(work: Work, roofline: Roofline, rows: int, settings: Settings) -> Held:
    """The floors of some work by either clock."""
    dtype, device = settings.dtype, settings.device
    return Held(
        work,
        floors(work, roofline.wall, rows, dtype, device),
        floors(work, roofline.processor, rows, dtype, device) if device.type == "cpu" else None,
    )


def measured_values(
    times: Times, held: Held | None, roofline: Roofline, settings: Settings
) -> dict[str, Any]:
    """The fields of a record that every kind of cell has."""
    one_thread = settings.threads == 1 and settings.device.type == "cpu"
    noise: Doubt = doubt(times.wall, times.processor if one_thread else None)
    values: dict[str, Any] = {
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": str(settings.device),
        "threads": settings.threads,
        "turns": settings.turns,
        "ms": times.least * 1e3,
        "ms_median": times.median * 1e3,
        "processor_ms": times.least_processor * 1e3,
        "ms_turns": tuple(1e3 * seconds for seconds in times.wall),
        "spread": noise.spread,
        "waiting": noise.waiting,
    }
    if held is None:
        return values
    values |= vars(held.wall)
    values["gigabytes_per_second"] = held.wall.bytes_read / times.least / 1e9
    if roofline.wall.copy:
        rate = held.wall.bytes_read / times.least
        values["share_of_copy"] = rate / roofline.wall.copy
    values["ratio"] = times.least * 1e3 / held.wall.floor_ms
    if held.processor is not None:
        values["processor_ratio"] = times.least_processor * 1e3 / held.processor.floor_ms
    return values


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within: torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _enough_memory(title: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not told and not isinstance(error, MemoryError):
            raise
        raise RecipeError(
            f"{title}: out of memory. All checkpoints hold their caches at the same time: give "
            "smaller --batch, --context or --length, or fewer checkpoints."
        ) from None
