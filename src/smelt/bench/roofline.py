"""What this machine can do: bytes per second of a small product, FLOPs per second of a large one.

A decode step reads weights for a few rows of input. It is never faster than its bytes at the rate
at which the product of one row reads weights, nor than its FLOPs at the rate of products of as many
rows as the batch has. Both rates are the best of several matrices, so that a floor is a floor. The
rate of copying memory stands beside them: nothing of a model is in it.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional

from smelt.bench.clock import timed

MIB = 1 << 20
SHAPES = {"cpu": ((4096, 1024), (1024, 4096)), "cuda": ((16384, 4096), (4096, 16384))}
"""[outputs, inputs] of the matrices read, wide and narrow; a GPU's are worth a launch each."""
MOST_ROWS = 256
"""Of a product whose rate is measured: with more, it is no faster for its FLOPs."""

_ByRows = Annotated[dict[int, PositiveFloat], Field(min_length=1)]


@dataclass
class Rates:
    """The best that was measured of a machine, at one dtype."""

    memory: NonNegativeFloat = 0.0  # bytes per second, out of a buffer far larger than the cache
    cache: PositiveFloat | None = None  # the same out of the last cache; None: not measured (GPUs)
    flops: _ByRows = field(default_factory=dict)  # per second, by rows of input
    copy: float | None = None  # bytes per second, read and written, of a copy in memory

    def flops_at(self, rows: int) -> float:
        """FLOPs per second of products of so many rows: as of the most measured that are no more.

        Of fewer rows than any that were measured: as of the fewest.
        """
        measured = [r for r in self.flops if r <= rows]
        return self.flops[max(measured) if measured else min(self.flops)]


@dataclass
class Roofline:
    """Measures the rates again at every `turn`, in between whatever is held against them.

    A measurement takes some tens of milliseconds, as the steps do: the best of many short ones
    would find moments of quiet that no step can. Where it takes longer (caches of hundreds of MB)
    a turn is left out once `always` were made and they took a quarter of all time.
    """

    dtype: torch.dtype
    device: torch.device
    rows: Iterable[int]
    always: int = 5
    wall: Rates = field(default_factory=Rates)
    processor: Rates = field(default_factory=Rates)  # per second of the processor

    def __post_init__(self) -> None:
        self.rows = sorted({min(rows, MOST_ROWS) for rows in self.rows})
        self.shapes = SHAPES[self.device.type]
        outputs, inputs = self.shapes[0]
        size = outputs * inputs
        count = max(2, far_bytes(self.device) // (size * self.dtype.itemsize))
        self._far = torch.full((count, size), 0.5, dtype=self.dtype, device=self.device)
        near = size // 2 if self.device.type == "cpu" else 0
        self._near = torch.full((near,), 0.5, dtype=self.dtype, device=self.device)
        self._turns, self._spent, self._begin = 0, 0.0, time.perf_counter()

    def turn(self) -> None:
        """Measure everything once more; the best counts."""
        begin = time.perf_counter()
        if self._turns >= self.always and self._spent > (begin - self._begin) / 4:
            return
        passes = max(1, min(4, 1024 * MIB // self._far.nbytes))
        for outputs, inputs in self.shapes:
            matrices = self._far.view(-1, outputs, inputs)
            for best, found in self._both(self._read(matrices, passes)):
                best.memory = max(best.memory, found)
            if self._near.numel():
                half = self._near.view(1, outputs // 2, inputs)
                for best, found in self._both(self._read(half, 16)):
                    best.cache = max(best.cache or 0.0, found)
                matrices = half
            for rows in self.rows:
                for best, found in self._both(self._product(matrices[0], rows)):
                    best.flops[rows] = max(best.flops.get(rows, 0.0), found)
        for best, found in self._both(self._copy(passes)):
            best.copy = max(best.copy or 0.0, found)
        self._turns += 1
        self._spent += time.perf_counter() - begin

    def _both(self, rates: tuple[float, float]) -> Iterable[tuple[Rates, float]]:
        return zip((self.wall, self.processor), rates, strict=True)

    def _read(self, matrices: Tensor, repeats: int) -> tuple[float, float]:
        """Bytes per second, by either clock, of products of one row with each matrix in turn."""
        x = torch.ones(1, matrices.shape[2], dtype=self.dtype, device=self.device)

        def job() -> None:
            for _ in range(repeats):
                for matrix in matrices:
                    functional.linear(x, matrix)

        return self._rates(repeats * matrices.nbytes, job)

    def _product(self, matrix: Tensor, rows: int) -> tuple[float, float]:
        """FLOPs per second, by either clock, of products of so many rows with one matrix."""
        x = torch.ones(rows, matrix.shape[1], dtype=self.dtype, device=self.device)
        repeats = max(2, 512 // rows)

        def job() -> None:
            for _ in range(repeats):
                functional.linear(x, matrix)

        return self._rates(2 * repeats * rows * matrix.numel(), job)

    def _copy(self, repeats: int) -> tuple[float, float]:
        """Bytes per second, read and written, of copying one half of the buffer to the other."""
        half = len(self._far) // 2
        source, target = self._far[:half], self._far[half : 2 * half]

        def job() -> None:
            for _ in range(repeats):
                target.copy_(source)

        return self._rates(repeats * 2 * source.nbytes, job)

    def _rates(self, amount: int, job: Callable[[], None]) -> tuple[float, float]:
        job()
        taken = timed(job, self.device)
        return amount / taken.least, amount / taken.least_processor


def far_bytes(device: torch.device) -> int:
    """Bytes of the buffer that memory is read out of: four times the last cache."""
    return 4 * last_cache_bytes(device)


def last_cache_bytes(device: torch.device) -> int:
    """The size of the largest cache between the memory and the processor; 32 MiB where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": MIB}
    found = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        found.append(int(text.rstrip("KM")) * units.get(text[-1], 1))
    return max(found, default=32 * MIB)
