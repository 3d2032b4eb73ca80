"""Whether checkpoints fit the memory, told from their files before any weight is read."""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from smelt.bench.roofline import far_bytes
from smelt.checkpoint.source import Checkpoint
from smelt.compress.align import available_memory
from smelt.errors import CheckpointError


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights in memory, in this type."""
    names = {checkpoint.stored_name(name) for name in checkpoint.state} - {None}
    shapes = (checkpoint.state[name].shape for name in names if name is not None)
    return sum(prod(shape) for shape in shapes) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Bytes that a device could give now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [available_memory()]
    for limit, used in _GROUPS:
        try:
            most = Path(limit).read_text(encoding="ascii").strip()
            now = Path(used).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if most.isdigit() and now.isdigit():
            limits.append(max(0, int(most) - int(now)))
    return min(limits)


_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
"""Where a container's limit and its use are: either kind of control group."""


def check_room(
    checkpoints: Sequence[Checkpoint],
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_timed: bool = True,
) -> None:
    """Raise CheckpointError where the weights will not fit.

    Args:
        is_timed: all are in memory at once, and the buffer of the machine's rates; otherwise one
            after another, each in a process of its own.
    """
    sizes = [weight_bytes(one, dtype) for one in checkpoints]
    # on its way in, a checkpoint is there twice: the largest of them, for a moment
    largest = max(sizes, default=0)
    own = sum(sizes) + far_bytes(device) if is_timed else largest
    needed = own + (largest if device.type == "cpu" else 0)
    free = free_bytes(device)
    if needed <= free:
        return
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    names = "together" if is_timed and len(sizes) > 1 else "in memory"
    raise CheckpointError(
        f"The checkpoints take {needed / 1e9:.1f} GB {names} as "
        f"{str(dtype).removeprefix('torch.')} ({checkpoints[largest].folder.name} alone "
        f"{sizes[largest] / 1e9:.1f} GB of weights), and {device} has {free / 1e9:.1f} GB free. "
        "Give fewer at a time, a smaller --dtype (bfloat16), or a machine with more."
    )
