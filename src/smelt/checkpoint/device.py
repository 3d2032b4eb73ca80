"""The device that blocks run on, by name, and the memory they leave behind."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from smelt.errors import RecipeError


def check_device(name: str) -> torch.device:
    """The device of that name, if this machine has it.

    Raises:
        RecipeError: no such device here; says which there are.
    """
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device = {name!r}: no such device. Here are: {', '.join(here)}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        reason = "this PyTorch is built without CUDA" if torch.version.cuda is None else "not found"
        raise RecipeError(
            f"device = {name!r}: there is no such GPU ({reason}). Here are: {', '.join(here)}."
        )
    return device


@contextlib.contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Within, this thread's CPU arithmetic takes numbers below 1e-38 for zero.

    Softmax gradients of a trained model are full of them, and products with such numbers take many
    times as long: a small Switch trained at half its speed after 500 steps. Threads of one
    operation, where there are several, are not reached.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def give_memory_back() -> None:
    """Have malloc return what freed activations of many sizes left in it.

    Some 300 MB after a calibration; 2 GB after 700 training steps of a small MoE, whose experts
    have other numbers of rows at every step. glibc only; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
