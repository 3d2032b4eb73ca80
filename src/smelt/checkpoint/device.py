"""The device that blocks run on, by name."""

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
