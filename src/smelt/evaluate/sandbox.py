"""A program that a model wrote, run where it can do little: is it right by its tests?

No sandbox of one process is proof against somebody who means harm. This one holds what a language
model writes by accident: endless loops, huge lists, deleted files, network calls.
"""

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from smelt.errors import SmeltError

SECONDS = 5
"""Of the processor's time for a program and its tests."""

_WAITING = 20  # seconds of the clock, on a machine that is busy with other things
_MEGABYTES = 512
_NOBODY = 65534

_USUAL = (
    "bisect, collections, copy, decimal, fractions, functools, hashlib, heapq, itertools, json, "
    "math, operator, os, random, re, statistics, string, time, typing"
)
"""Modules that such programs import. They are read first: nobody may not be able to read them."""

_RUNNER = f"""
import resource, sys, {_USUAL}
def limit(name, most):
    resource.setrlimit(getattr(resource, name), (most, most))
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if hasattr(libc, "unshare"):  # Linux: no network but an unconnected one, where that is allowed
    libc.unshare(0x40000000) and libc.unshare(0x10000000 | 0x40000000)
if hasattr(libc, "prctl"):
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
if os.getuid() == 0:
    os.setgroups([]); os.setgid({_NOBODY}); os.setuid({_NOBODY})
limit("RLIMIT_AS", {_MEGABYTES} << 20)
limit("RLIMIT_CPU", {SECONDS})
limit("RLIMIT_FSIZE", 1 << 20)
limit("RLIMIT_NOFILE", 32)
limit("RLIMIT_CORE", 0)
limit("RLIMIT_NPROC", 1)
word, _, program = sys.stdin.read().partition("\\n")
sys.stdin = open("/dev/null")
del limit, libc, resource, ctypes
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
sys.__stdout__.write("\\n" + word)
"""


def passes(program: str, tests: str) -> bool:
    """Whether a program runs to the end of its tests, without an error and in time.

    It runs in a process of its own, in an empty folder that is removed afterwards, with 512 MiB of
    memory, 5 s of the processor, files of 1 MiB, no further processes, no environment and, where
    the system allows it, no network. Root runs it as nobody.

    Raises:
        SmeltError: no program at all can be run here in this way.
    """
    _check()
    return _run(f"{program}\n{tests}")


@functools.cache
def _check() -> None:
    if sys.platform == "win32":
        raise SmeltError("Programs that a model wrote are executed on Linux and macOS only.")
    if not _run(f"import {_USUAL}\nassert sum([1, 2]) == 3"):
        raise SmeltError(
            "Programs that a model wrote cannot be executed here: a correct one does not run with "
            "the limits of the sandbox. Leave humaneval out, or measure it on another machine."
        )


def _run(program: str) -> bool:
    word = secrets.token_hex(16)  # said last: a program that ends early has not passed
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            out, _ = child.communicate(f"{word}\n{program}".encode(), timeout=_WAITING)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
    return child.returncode == 0 and out.decode(errors="replace").endswith(word)
