"""`ShardedTrainer`: the trainer of one process on a model that is divided among several.

Only how its state is saved and restored differs. A checkpoint is what one process would write: it
is gathered to the first process, so that any number of processes can go on from it.
"""

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from smelt import processes
from smelt.train import distributed
from smelt.train.step import RunTrainer

OPTIMIZER_NAME, SCHEDULER_NAME = "optimizer.pt", "scheduler.pt"  # where the Trainer looks


class ShardedTrainer(RunTrainer):
    """Reads and writes whole weights and optimizer states, in the first process."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights; all processes call it together."""
        plain = distributed.plain(self.net, torch.float32)
        if plain is not None:
            plain.save_pretrained(output_dir or str(self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = whole_state(self.optimizer)
        if state is not None:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        if processes.is_first():
            super()._save_rng_state(output_dir)

    def _load_from_checkpoint(
        self,
        resume_from_checkpoint: str,
        model: nn.Module | None = None,  # noqa: ARG002
    ) -> None:
        loaded = None
        if processes.is_first():
            kind = distributed.kind(self.net)
            loaded = kind.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        distributed.fill(self.net, loaded)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = None
        if processes.is_first():
            path = Path(checkpoint) / OPTIMIZER_NAME
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        restore_state(self.optimizer, state)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The optimizer's `state_dict` with whole tensors, in the first process; None in the others.

    It is what the optimizer of one process would save. All processes ask together.
    """
    found = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for index, values in found["state"].items():
        full = {name: distributed.whole(value) for name, value in values.items()}
        if processes.is_first():
            state[index] = {name: value.cpu() for name, value in full.items()}
    return {**found, "state": state} if processes.is_first() else None


def restore_state(optimizer: torch.optim.Optimizer, whole_state: dict[str, Any] | None) -> None:
    """Go on from a `whole_state`, or from one that a single process saved.

    Args:
        optimizer: of the divided model.
        whole_state: in the first process.
    """
    skeleton: list[Any] = [None]
    if whole_state is not None:
        shapes = {
            index: {name: value if value.ndim == 0 else None for name, value in values.items()}
            for index, values in whole_state["state"].items()
        }
        skeleton = [{"state": shapes, "param_groups": whole_state["param_groups"]}]
    dist.broadcast_object_list(skeleton, 0, device=torch.device("cpu"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = skeleton[0]["state"]
    for index, values in state.items():
        parameter = cast(DTensor, parameters[index])
        for name in values:
            if name == "step":
                continue
            full = torch.empty(parameter.shape)
            if whole_state is not None:
                full = whole_state["state"][index][name].reshape(parameter.shape)
            values[name] = distribute_tensor(
                full.to(parameter.device, parameter.dtype),
                parameter.device_mesh,
                parameter.placements,
            )
    optimizer.load_state_dict(skeleton[0])
