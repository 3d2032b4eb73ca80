"""The log of a run: one JSON object a line, and the clock that its figures are taken with."""

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from smelt import processes
from smelt.errors import RecipeError

logger = logging.getLogger(__name__)


class Clock:
    """Seconds of training, those before a resume and without pauses; of the whole run beside."""

    def __init__(self) -> None:
        self.trained_before = self.run_before = self.paused = 0.0
        self.begin = time.perf_counter()

    @property
    def whole(self) -> float:
        """All seconds."""
        return self.run_before + time.perf_counter() - self.begin

    @property
    def trained(self) -> float:
        """Those spent on steps."""
        return self.trained_before + time.perf_counter() - self.begin - self.paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within: evaluating or saving."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - begin

    def start(self) -> None:
        """Now the first step begins."""
        self.begin, self.paused = time.perf_counter(), 0.0

    def state(self) -> dict[str, float]:
        """What a resume goes on from."""
        return {"trained": self.trained, "whole": self.whole}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a state."""
        self.trained_before, self.run_before = state["trained"], state["whole"]
        self.start()


class Log:
    """A file of JSON lines; for tensorboard, the same numbers beside it.

    Of several processes the first one writes.
    """

    def __init__(self, path: Path, *, with_tensorboard: bool = False) -> None:
        self.path, self._board = path, with_tensorboard
        self._writer: Any = None
        self._is_written = processes.is_first()

    def write(self, *, step: int, **values: Any) -> None:
        """Add one line."""
        if not self._is_written:
            return
        line = json.dumps({"step": step, **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        logger.info("%s", line)
        if self._board:
            if self._writer is None:
                self._writer = _board_writer(self.path.parent / "tensorboard", step)
            for name, value in _scalars(values):
                self._writer.add_scalar(name, value, step)

    def cut(self, step: int) -> None:
        """Forget what was written after a step; a line that a kill left unfinished too."""
        if not self._is_written or not self.path.exists():
            return
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
            except json.JSONDecodeError:
                break
        self.path.write_text("".join(lines), encoding="utf-8")

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            self._writer.close()


def check_tensorboard() -> None:
    """Raise a RecipeError where tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise RecipeError(
            "tensorboard: true needs the package. Install it with: pip install "
            "'smelt[tensorboard]', or leave the setting out: smelt/log.jsonl has the same numbers."
        ) from None


def _board_writer(folder: Path, step: int) -> Any:
    """A writer whose lines take the place of those that a killed run wrote from this step on."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step)


def _scalars(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings and lists, by their path."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from _scalars(value, f"{name}/{key}" if name else str(key))
    elif isinstance(values, int | float):
        yield name, float(values)


def peak_memory_bytes() -> int:
    """The most memory the process held so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
