"""Sums over processes: the one place where training statistics leave a process."""

import torch
import torch.distributed as dist
from torch import Tensor


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
