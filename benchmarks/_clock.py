"""Where the time of a compression goes: seconds by phase, told by smelt's own functions."""

import contextlib
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

PHASES = {
    "opening": [("checkpoint.source", "Checkpoint.open"), ("compress.pipeline", "read_facts")],
    "text": [("compress.inputs", "read_text")],
    "statistics": [("compress.pipeline", "run_calibration")],
    "reading": [("checkpoint.source", "Checkpoint.read"), ("checkpoint.sink", "raw")],
    "plan": [("compress.pipeline", "run_plan")],
    "check for NaN": [("compress.apply", "Compressor.bank")],
    "cost matrices": [("compress.layer", "weight_cost"), ("compress.align", "_negated")],
    "assignments": [("compress.align", "linear_sum_assignment")],
    "merging": [("compress.rules", "merge_groups")],
    "layout": [("compress.layer", "write_bank"), ("compress.apply", "encode")],
    "writing": [("checkpoint.sink", "Sink.write")],
    "finishing": [("checkpoint.sink", "Sink.finish")],
}
"""The functions whose time makes up each phase; time inside another phase's counts there."""


class Clock:
    """Seconds by phase; the time of a phase inside another counts for the inner one alone."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def _turn(self) -> None:
        now = self.now()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def watching(self, phases: dict[str, list[tuple[str, str]]]) -> Iterator[None]:
        """Within: the named functions of smelt report to this clock."""
        with contextlib.ExitStack() as stack:
            for phase, functions in phases.items():
                for module, path in functions:
                    self._wrap(stack, phase, f"smelt.{module}", path)
            yield

    def _wrap(self, stack: contextlib.ExitStack, phase: str, module: str, path: str) -> None:
        owner = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        kept = owner.__dict__[name]
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        setattr(owner, name, staticmethod(timed) if isinstance(kept, classmethod) else timed)
        stack.callback(setattr, owner, name, kept)
