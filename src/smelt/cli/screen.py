"""What a command shows: results on stdout, for people or machines; progress on stderr."""

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

TITLES = {"calibrate": "calibrating", "compress": "writing", "verify": "checking checksums"}
_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal to draw a bar on."""


class Report(Protocol):
    """Told (block, done, total) as a stage goes on."""

    def __call__(self, block: str, done: int, total: int, /) -> None: ...


class Watch(Protocol):
    """Given the name of a stage of work, where to report its progress."""

    def __call__(self, stage: str, /) -> Report: ...


class Stopped(BaseException):
    """A signal asked the process to end; work that was begun is left as it is."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
        self.kept: Path | None = None  # where unfinished work lies, if there is any


class Screen:
    """The output of one command."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.begin = time.perf_counter()
        self._err = Console(stderr=True, highlight=False)

    @classmethod
    def of_the_first(cls, *, as_json: bool, quiet: bool) -> "Screen":
        """The screen of the first of several processes; the others say nothing, nor warn."""
        from smelt import processes

        if processes.is_first():
            return cls(as_json=as_json, quiet=quiet)
        warnings.simplefilter("ignore")
        return cls(quiet=True)

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return round(time.perf_counter() - self.begin, 1)

    def note(self, text: str) -> None:
        """A remark on what is being done."""
        if not self.quiet:
            self._err.print(Text(text), soft_wrap=True)

    def result(self, value: Any, text: str = "") -> None:
        """What the command found: the value for a machine, or the text for a person."""
        if self.as_json:
            print(json.dumps(_plain(value), indent=1, ensure_ascii=False))
        elif text and not self.quiet:
            print(text)

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Within: stages of work show how far they are and how long they still take."""
        if self.quiet:
            yield lambda stage: lambda block, done, total: None
        elif self._err.is_terminal:
            with self._bars() as progress:
                yield lambda stage: _Bar(progress, _title(stage))
        else:
            yield lambda stage: _Lines(self, _title(stage))

    def _bars(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[block]}", markup=False),
            console=self._err,
            transient=True,
        )


def _title(stage: str) -> str:
    return TITLES.get(stage, stage)


class _Bar:
    """A stage as a bar."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress = progress
        self.task = progress.add_task(title, total=None, block="")

    def __call__(self, block: str, done: int, total: int, /) -> None:
        self.progress.update(self.task, completed=done, total=total, block=block)


class _Lines:
    """A stage as a line now and then."""

    def __init__(self, screen: Screen, title: str) -> None:
        self.screen, self.title = screen, title
        self.begin = self.last = time.perf_counter()

    def __call__(self, block: str, done: int, total: int, /) -> None:
        now = time.perf_counter()
        if now - self.last < _EVERY or done == 0:
            return
        self.last = now
        left = (now - self.begin) / done * (total - done)
        self.screen.note(f"{self.title}: {done} of {total} ({block}), about {clock(left)} left")


@contextmanager
def keeping(destination: str | Path) -> Iterator[None]:
    """Within: a signal says where the unfinished folder lies, for the same command to go on."""
    try:
        yield
    except Stopped as stopped:
        path = Path(destination).expanduser()
        staging = path.with_name(path.name + ".partial")
        stopped.kept = staging if staging.is_dir() else None
        raise


def show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """A warning as one line on stderr; those that libraries give their developers are left out."""
    if category is UserWarning or category is ResourceWarning:
        Console(stderr=True, highlight=False).print(
            Text(f"smelt: warning: {message}"), soft_wrap=True
        )


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within: warnings are shown by `show_warning`, each text once."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        warnings.filterwarnings("once", category=UserWarning, module=r"smelt\.")
        warnings.showwarning = show_warning  # type: ignore[assignment]
        yield


def clock(seconds: float) -> str:
    """A duration as people say it: 42 s, 3:20 min, 2:05 h."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def size(num_bytes: float) -> str:
    """Bytes in the unit that gives one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 100 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def number(value: float) -> str:
    """A count with the letter for its thousands: 950, 12.3 k, 30.5 M, 1.2 B."""
    for unit in ("", " k", " M", " B"):
        if value < 1000:
            return f"{value:.3g}{unit}" if value < 100 else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.4g} T"


def counts(values: Sequence[int]) -> str:
    """Experts per layer: 64, or 31 to 90 (64.0 on average)."""
    if len(set(values)) == 1:
        return str(values[0])
    return f"{min(values)} to {max(values)} ({sum(values) / len(values):.1f} on average)"


def disk_bytes(folder: str | Path) -> int:
    """Bytes of the weight files of a folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _plain(value: Any) -> Any:
    """The value as JSON holds it: Inf and NaN, which JSON has not got, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
