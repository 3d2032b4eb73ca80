"""What a step costs: milliseconds by phase, and the share of the machine's arithmetic it uses."""

import time
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedConfig

from smelt.samoe.phases import Stopwatch, timed
from smelt.train.settings import TrainRecipe


class StepTimer:
    """A stopwatch for one step at a time, off between them.

    A SaMoE model tells its phases itself; of a stock family all of forward and backward is "other".
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._watch: Stopwatch | None = None

    def start(self) -> None:
        """A step begins; its batch is there."""
        self._watch = self._stack.enter_context(timed())

    def lap(self, phase: str) -> None:
        """What ran since the last mark was that phase; nothing happens between timed steps."""
        if self._watch is not None:
            self._watch.lap(phase)

    def stop(self) -> dict[str, float]:
        """The step is over: its milliseconds by phase."""
        if self._watch is None:
            return {}
        seconds, self._watch = dict(self._watch.seconds), None
        self._stack.close()
        return {phase: round(1e3 * value, 3) for phase, value in seconds.items()}


def training_flops_per_token(config: PreTrainedConfig, recipe: TrainRecipe) -> float | None:
    """Forward and backward (three times the forward), at the mean context; None: not known.

    A causal token attends to half of the sequence on average, a masked one to all of it.
    """
    count: Any = getattr(config, "flops_per_token", None)
    if count is None:
        return None
    length = recipe.sequence_length
    return 3.0 * float(count(context=length // 2 if recipe.objective == "causal" else length))


def peak_flops(recipe: TrainRecipe, device: torch.device) -> float | None:
    """The floating-point operations per second that count as all of the machine's."""
    if recipe.peak_flops != "measure":
        return recipe.peak_flops
    return measured_flops(device, getattr(torch, recipe.precision))


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What a product of two square matrices reaches, the best of five tries, in about a second."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the first one warms up: it is never the best by much
        begin = _now(device)
        a @ b
        best = min(best, _now(device) - begin)
    return 2 * size**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
