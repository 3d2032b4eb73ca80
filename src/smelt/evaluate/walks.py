"""What measurements add to a walk: progress, and one module of another model beside it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from smelt.checkpoint.walk import Stage, Visit, put
from smelt.compress.calibrate import Progress


class Steps:
    """Counts the blocks of one walk or several and tells of each."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0

    @contextlib.contextmanager
    def visit(self, stage: Stage) -> Iterator[None]:
        """Around a block of a walk."""
        yield
        self.done += 1
        if self.progress:
            self.progress(stage.name, self.done, self.total)

    def around(self, inner: Visit) -> Visit:
        """The same, with another visit inside."""

        @contextlib.contextmanager
        def both(stage: Stage) -> Iterator[None]:
            with self.visit(stage), inner(stage):
                yield

        return both


@contextlib.contextmanager
def weights_in(
    model: nn.Module, names: Sequence[str], read: Callable[[str], Tensor], device: torch.device
) -> Iterator[None]:
    """Within: these parameters and buffers of a skeleton hold what `read` gives."""
    meta = dict(model.named_parameters(remove_duplicate=False))
    try:
        for name in names:
            put(model, name, read(name), device)
        yield
    finally:
        for name in names:
            if name in meta:
                owner, _, leaf = name.rpartition(".")
                model.get_submodule(owner)._parameters[leaf] = meta[name]


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers that are computed, not stored, follow the weights to their device."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                part._buffers[name] = buffer.to(device)
