"""What this machine can do: bytes per second of a small product, FLOPs per second of a large one.

A decode step reads weights for a few rows of input. It is never faster than its bytes at the rate
at which the product of one row reads weights, nor than its FLOPs at the rate of products of as many
rows as the batch has. Both rates are the best of several matrices, so that a floor is a floor.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from smelt.bench.clock import timed

MIB = 1 << 20
SHAPES = {"cpu": ((4096, 1024), (1024, 4096)), "cuda": ((16384, 4096), (4096, 16384))}
"""[outputs, inputs] of the matrices read, wide and narrow; a GPU's are worth a launch each."""


@dataclass
class Rates:
    """The best that was measured of a machine, at one dtype."""

    memory: float = 0.0  # bytes per second, out of a buffer far larger than the cache
    cache: float | None = None  # bytes per second, out of the last cache; None: not measured (GPUs)
    flops: dict[int, float] = field(default_factory=dict)  # per second, by rows of input


@dataclass
class Roofline:
    """Measures the rates again at every `turn`, in between whatever is held against them.

    A measurement takes some tens of milliseconds, as the steps do: the best of many short ones
    would find moments of quiet that no step can.
    """

    dtype: torch.dtype
    device: torch.device
    rows: Iterable[int]
    wall: Rates = field(default_factory=Rates)
    processor: Rates = field(default_factory=Rates)  # per second of the processor

    def __post_init__(self) -> None:
        self.rows = sorted(set(self.rows))
        shapes = SHAPES[self.device.type]
        self._far = [self._matrices(shape, 8 * last_cache_bytes(self.device)) for shape in shapes]
        small = ((o // 2, i) for o, i in shapes) if self.device.type == "cpu" else ()
        self._near = [self._matrices(shape, 1) for shape in small]

    def turn(self) -> None:
        """Measure everything once more; the best counts."""
        for matrices in self._far:
            for best, found in self._both(self._read(matrices, 4)):
                best.memory = max(best.memory, found)
        for matrices in self._near:
            for best, found in self._both(self._read(matrices, 16)):
                best.cache = max(best.cache or 0.0, found)
        for matrices in self._near or self._far:
            for rows in self.rows:
                for best, found in self._both(self._product(matrices[0], rows)):
                    best.flops[rows] = max(best.flops.get(rows, 0.0), found)

    def _both(self, rates: tuple[float, float]) -> Iterable[tuple[Rates, float]]:
        return zip((self.wall, self.processor), rates, strict=True)

    def _matrices(self, shape: tuple[int, int], num_bytes: int) -> Tensor:
        count = max(1, num_bytes // (shape[0] * shape[1] * self.dtype.itemsize))
        return torch.full((count, *shape), 0.5, dtype=self.dtype, device=self.device)

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

    def _rates(self, amount: int, job: Callable[[], None]) -> tuple[float, float]:
        job()
        taken = timed(job, self.device)
        return amount / taken.least, amount / taken.least_processor


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
