"""Timing on a machine that does other work too: jobs in turns, wall clock beside processor time."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch


@dataclass
class Times:
    """Seconds of one job, measured several times."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)  # of all threads; not of a GPU

    def add(self, taken: "Times") -> None:
        """Append what another measurement found."""
        self.wall += taken.wall
        self.processor += taken.processor

    @property
    def least(self) -> float:
        return min(self.wall)

    @property
    def median(self) -> float:
        return median(self.wall)

    @property
    def least_processor(self) -> float:
        return min(self.processor)


def timed(job: Callable[[], object], device: torch.device, count: int = 1) -> Times:
    """Seconds of one call of `job`, which does something `count` times."""
    synchronise(device)
    wall, processor = time.perf_counter(), time.process_time()
    job()
    synchronise(device)
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    return Times([wall / count], [processor / count])


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
