"""When training cannot go on: where a loss stopped being a number, and a disk that is full."""

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.errors import CheckpointError, RecipeError
from smelt.train.data import Example
from smelt.train.resume import last_checkpoint, step_of


class DivergedError(RecipeError):
    """A step's loss or gradient is no finite number; the weights are those before the step."""


def first_fault(
    model: nn.Module, batches: Sequence[Example], loss_of: Callable[[Example], Tensor]
) -> str:
    """Where a step's numbers first stop being finite: weights, then forward, then backward.

    Runs the step once more, with a look at every module.

    Args:
        model: as it was before the step.
        batches: the step's micro-batches.
        loss_of: the loss of one of them.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f"in the weights of {name}"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_look(name or "the model", found))
        for name, module in model.named_modules()
    ]
    try:
        for batch in batches:
            model.zero_grad()
            loss = loss_of(batch)
            if found:
                return f"in the output of {found[0]}"
            if not _is_finite(loss):
                return "in the loss itself: the logits are finite"
            loss.backward()
            # Gradients flow from the last module to the first.
            for name, parameter in reversed(list(model.named_parameters())):
                if parameter.grad is not None and not _is_finite(parameter.grad):
                    return f"in the gradient of {name}"
    finally:
        for hook in hooks:
            hook.remove()
    return "in the sum over micro-batches"


def _look(name: str, found: list[str]) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        values = output if isinstance(output, tuple | list) else [output]
        if any(isinstance(one, Tensor) and not _is_finite(one) for one in values):
            found.append(name)

    return hook


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


@contextmanager
def disk_may_fill(partial: Path) -> Iterator[None]:
    """Within: a full disk is a CheckpointError that says what is left of the run.

    The unfinished checkpoint is removed, the one before it is not touched.
    """
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error, partial):
            raise
        checkpoint = last_checkpoint(partial / "smelt")
        kept = "Nothing of the run could be kept."
        if checkpoint is not None:
            kept = f"It is kept up to step {step_of(checkpoint)}: the same command goes on there."
        raise CheckpointError(
            f"{partial}: the disk is full. {kept} Make room, or lower keep_checkpoints, or raise "
            "checkpoint_every."
        ) from error


def _is_disk_full(error: Exception, folder: Path) -> bool:
    """Torch and safetensors say it in errors of their own."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return True
    text = str(error).lower()
    if "no space left" in text or "os error 28" in text or "disk quota" in text:
        return True
    is_writer = "pytorchstreamwriter" in text or "inline_container" in text
    return is_writer and folder.exists() and shutil.disk_usage(folder).free < 1 << 20
