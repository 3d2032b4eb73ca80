"""Weights put in place in a skeleton, and taken out again."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


def put(model: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    """Put a value in place of a parameter or buffer, in the type that the model computes in."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    expected = owner._parameters.get(leaf)
    if expected is None:
        buffer = owner._buffers[leaf]
        owner._buffers[leaf] = value.to(device, value.dtype if buffer is None else buffer.dtype)
    else:
        value = value.to(device, expected.dtype)
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def take_out(model: nn.Module, meta: dict[str, nn.Parameter]) -> None:
    """Put these parameters of a skeleton back, and give the memory of what is there up."""
    for name, param in meta.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = param


@contextlib.contextmanager
def weights_in(
    model: nn.Module, names: Sequence[str], read: Callable[[str], Tensor], device: torch.device
) -> Iterator[None]:
    """Within: these parameters and buffers of a skeleton hold what `read` gives."""
    all_meta = dict(model.named_parameters(remove_duplicate=False))
    meta = {name: all_meta[name] for name in names if name in all_meta}
    try:
        for name in names:
            put(model, name, read(name), device)
        yield
    finally:
        take_out(model, meta)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers that are computed, not stored, follow the weights to their device."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                part._buffers[name] = buffer.to(device)
