"""The command line's way in: signals, errors and exit codes."""

import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from smelt.cli.app import app
from smelt.cli.screen import Stopped, plain_warnings
from smelt.errors import SmeltError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OF_THE_MACHINE = {
    getattr(errno, name)
    for name in (
        "EACCES EPERM ENOSPC EROFS EDQUOT EIO ENOENT EEXIST ENOTDIR EISDIR ENAMETOOLONG EMFILE"
    ).split()
    if hasattr(errno, name)
}
"""Errors of a file system: nothing that a traceback would explain."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit code.

    0: done. 2: the input is at fault, and one line on stderr says how. 130 and 143: stopped by
    SIGINT or SIGTERM. Anything unforeseen keeps its traceback, because it is our mistake.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with _stoppable(), plain_warnings():
            app(args=None if arguments is None else list(arguments), prog_name="smelt")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    except Stopped as stopped:
        return _stopped(stopped)
    except SmeltError as error:
        return _complain(str(error))
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror}. Mend the cause and run the same command again.")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or ["of the machine"])[0]
        return _complain(
            f"out of memory ({first}). Smaller batches (--set calibration.batch_size=1), a smaller "
            "--set calibration.sample_tokens=1024 and --workers 1 need less. What was done so far "
            "is kept: the same command goes on there."
        )
    return 0


def _complain(message: str) -> int:
    print(f"smelt: error: {message}", file=sys.stderr)
    return 2


def _stopped(stopped: Stopped) -> int:
    name = signal.Signals(stopped.signal).name
    kept = "Nothing was left behind."
    if stopped.kept is not None:
        kept = f"What is done so far is kept in {stopped.kept}: run the same command to go on."
    print(f"smelt: stopped by {name}. {kept}", file=sys.stderr)
    return 128 + stopped.signal


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within: SIGINT and SIGTERM raise Stopped; a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    before = {each: signal.signal(each, stop) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
