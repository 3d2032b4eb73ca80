"""The compressed model beside the original: each runs its own stream of the same walk."""

import contextlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

from smelt.checkpoint.place import move_buffers, put, take_out
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Stage
from smelt.compress.facts import Facts
from smelt.compress.form import skeleton_of
from smelt.compress.layer import Changed
from smelt.compress.plan import Plan


class Twin:
    """A skeleton of the result, whose blocks are filled one at a time."""

    def __init__(self, checkpoint: Checkpoint, facts: Facts, plan: Plan) -> None:
        self.model = skeleton_of(checkpoint, facts, plan, checkpoint.dtype)

    @contextlib.contextmanager
    def running(
        self, stage: Stage, changed: Sequence[Changed], stream: Container[int]
    ) -> Iterator[None]:
        """Within: the stream's batches run with the block's compressed layers."""
        new = {name: tensor for c in changed for name, tensor in c.tensors.items()}
        block = self.model.get_submodule(stage.name)
        meta = {f"{stage.name}.{name}": param for name, param in block.named_parameters()}
        own = stage.module.state_dict()
        for name in block.state_dict():
            path = f"{stage.name}.{name}"
            put(self.model, path, new[path] if path in new else own[name], stage.walk.device)
        move_buffers(block, stage.walk.device)

        def forward(*args: Any, **kwargs: Any) -> Any:
            run = block.forward if stage.walk.current in stream else stage.own
            return run(*args, **kwargs)

        try:
            with stage.runs_as(forward):
                yield
        finally:
            take_out(self.model, meta)
