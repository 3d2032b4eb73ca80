"""The processes that torchrun starts: how they meet, add up, take turns, and end together."""

import atexit
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from smelt.errors import SmeltError

T = TypeVar("T")

STALLED = timedelta(hours=1)  # a collective that takes longer has lost a process
_PREPARING = timedelta(days=2)  # for the process of a node that tokenises the text
_FAILED, _TOLD = "smelt/failed", "smelt/told"  # keys of the store that all processes share


class _Met:
    """What `meet` leaves for later calls."""

    store: Store | None = None
    waiting: dist.ProcessGroup | None = None  # of CPUs, with a long time limit


def started() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return int(os.environ.get("RANK", "0")) == 0


def meet() -> None:
    """Form one group of all processes, and choose each one's GPU where there are any.

    A second call, or one without torchrun, does nothing.
    """
    if started() == 1 or dist.is_initialized():
        return
    has_gpus = torch.cuda.is_available()
    if has_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, size = next(rendezvous("env://", timeout=STALLED))
    except ValueError as error:  # WORLD_SIZE without its companions
        raise SmeltError(
            f"WORLD_SIZE is {started()}, but the processes cannot find each other ({error}). Start "
            "them with torchrun (docs/scaling-out.md), or unset WORLD_SIZE."
        ) from None
    # torchrun --max-restarts keeps the store, with the addresses of processes that are gone
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _Met.store = store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=STALLED,
    )
    _Met.waiting = dist.new_group(backend="gloo", timeout=_PREPARING)


@contextmanager
def together() -> Iterator[None]:
    """Within: the processes are one group; when one fails, all end, and one of them says why.

    The process that fails first raises its error; the others leave with exit code 2 without a word,
    once that one has spoken.

    Raises:
        SmeltError: another process ended without a word (killed, or its node is gone).
    """
    if started() == 1:
        yield
        return
    meet()
    try:
        yield
    except BaseException as error:
        _end(error)
        raise
    finally:
        leave()


def leave() -> None:
    """The end of the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _Met.store = _Met.waiting = None


def _end(error: BaseException) -> None:
    """Return in the process that is to raise its error; leave in all others."""
    store = _Met.store
    assert store is not None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others when one has ended
    try:
        is_to_speak = store.add(_FAILED, 1) == 1
        if is_to_speak:
            atexit.register(store.set, _TOLD, "1")
        else:
            store.wait([_TOLD], timedelta(seconds=10))
    except (RuntimeError, dist.DistError):  # the store was the other's
        is_to_speak = False
    if not is_to_speak:
        raise SystemExit(2) from None
    if _is_of_a_peer(error):
        raise SmeltError(
            f"Process {os.environ.get('RANK')} of {started()} has lost another one of this run: "
            "that was killed, ran out of memory, or its node is gone. The same command goes on "
            "from the last checkpoint."
        ) from None


def _is_of_a_peer(error: BaseException) -> bool:
    """Whether a collective failed, and not what the process itself did."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def in_turn(make: Callable[[], T]) -> T:
    """What `make` gives, made by one process of each node first: the others find its files."""
    if not dist.is_initialized():
        return make()
    is_early = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_early:
        value = make()
    dist.barrier(group=_Met.waiting)
    return value if is_early else make()


def by_the_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, which alone calls it; every process gets a copy."""
    if not dist.is_initialized():
        return make()
    values: list[Any] = [make() if is_first() else None]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    value: T = values[0]
    return value


def num_processes() -> int:
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def total(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor summed over all processes, without gradient; one message for all of them.

    Every process calls it with tensors of the same shapes. Whole numbers below 2^53 stay exact.
    """
    if num_processes() == 1 or not tensors:
        return [tensor.detach() for tensor in tensors]
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [
        part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)
    ]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over all processes, in place and in its own type; one message for a type."""
    if num_processes() == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        these = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in these])
        dist.all_reduce(flat)
        for t, part in zip(these, flat.split([t.numel() for t in these]), strict=True):
            t.copy_(part.view_as(t))


def everybodys(value: T) -> list[T]:
    """The value of each process, in order of rank."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def share(count: int) -> range:
    """Which of so many things this process has: a run of them, in order of rank."""
    edges = [count * i // num_processes() for i in range(num_processes() + 1)]
    return range(edges[rank()], edges[rank() + 1])


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier(group=_Met.waiting)
