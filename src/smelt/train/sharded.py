"""`ShardedTrainer`: the trainer of one process on a model that is divided among several.

Only how its state is saved and restored differs. A checkpoint is what one process would write: it
is gathered to the first process, so that any number of processes can go on from it.
"""

from pathlib import Path

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from smelt.train import distributed, processes
from smelt.train.step import RunTrainer


class ShardedTrainer(RunTrainer):
    """Reads and writes whole weights and optimizer states, in the first process."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights; all processes call it together."""
        plain = distributed.plain(self.net, torch.float32)
        if plain is not None:
            plain.save_pretrained(output_dir or str(self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = distributed.whole_state(self.optimizer)
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
        distributed.restore_state(self.optimizer, state)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)
