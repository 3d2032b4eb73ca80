"""Where the time of a step goes: a stopwatch that the model's own forward and backward drive."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Seconds by phase. Each mark closes what ran since the one before it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = _now()

    def lap(self, phase: str) -> None:
        """What ran since the last mark was `phase`."""
        now = _now()
        self.seconds[phase] += now - self._last
        self._last = now


_current: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def timed() -> Iterator[Stopwatch]:
    """Within: every `mark` adds to the stopwatch yielded, forwards and backwards."""
    watch = Stopwatch()
    token = _current.set(watch)
    try:
        yield watch
        watch.lap("other")  # what ran since the last mark
    finally:
        _current.reset(token)


def mark(value: Tensor, *, done: str, follows: str) -> Tensor:
    """`value`, unchanged; a timed forward has just done `done`, and next does `follows`.

    The backward passes the same place the other way: it has just undone `follows`.
    """
    watch = _current.get()
    if watch is None:
        return value
    watch.lap(done)
    marked: Tensor = _Mark.apply(value, watch, follows)
    return marked


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, watch: Stopwatch, follows: str) -> Tensor:
        ctx.watch, ctx.follows = watch, follows
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.watch.lap(ctx.follows)
        return gradient, None, None


def _now() -> float:
    if torch.cuda.is_available():  # kernels run behind the calls that start them
        torch.cuda.synchronize()
    return time.perf_counter()
