"""The device that blocks run on, by name, and the memory they leave behind."""

import contextlib
import ctypes

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


def give_memory_back() -> None:
    """Have malloc return what freed activations of many sizes left in it.

    Some 300 MB after a calibration; 2 GB after 700 training steps of a small MoE, whose experts
    have other numbers of rows at every step. glibc only; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
