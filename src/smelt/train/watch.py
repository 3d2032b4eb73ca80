"""After every step: is the loss still a number, is it time to measure, is it time to save."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from smelt import processes
from smelt.checkpoint.device import give_memory_back
from smelt.train.checkpoints import save_weights
from smelt.train.measure import HeldOut, measure
from smelt.train.resume import STATE, step_of
from smelt.train.step import RunTrainer
from smelt.train.totals import Totals

OnStep = Callable[[int, int, float], None]


class Watch(TrainerCallback):
    """After every step: is the loss still a number, is it time to measure, is it time to save."""

    def __init__(
        self,
        trainer: RunTrainer,
        held_out: Sequence[HeldOut],
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        on_step: OnStep | None,
    ) -> None:
        self.trainer, self.held_out, self.on_step = trainer, held_out, on_step
        self.tokenizer, self.folder = tokenizer, folder
        self.few = [HeldOut(one.name, one.examples[:64], one.blocks) for one in held_out]
        recipe = trainer.recipe
        self.save_steps = set(recipe.checkpoint_steps())
        self.keep_steps = set(recipe.checkpoint_steps()[-recipe.keep_checkpoints :])
        self.kept: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Called by the Trainer before the first step."""
        self.trainer.clock.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Called by the Trainer when the batches of a step are there."""
        every = self.trainer.recipe.profile_every
        if every is not None and (state.global_step + 1) % every == 0:
            self.trainer.timer.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Called by the Trainer when the weights have changed."""
        trainer, step = self.trainer, state.global_step
        recipe = trainer.recipe
        trainer.totals.steps += 1
        trainer.timer.lap("optimizer")
        if phases := trainer.timer.stop():
            trainer.log_file.write(step=step, phases={**trainer.phases, **phases})
        if self.on_step is not None:
            self.on_step(step, recipe.steps, trainer.last_nats)
        if step % recipe.log_every == 0:
            control.should_log = True
        if step % 10 == 0:
            give_memory_back()
        with trainer.clock.pause():
            if step % recipe.evaluate_every == 0:
                self._evaluate(step)
            if step in self.keep_steps:
                self._keep(step)
        control.should_save = step in self.save_steps

    def _evaluate(self, step: int) -> None:
        trainer = self.trainer
        measured = measure(trainer.net, self.few, trainer.args.per_device_train_batch_size)
        trainer.net.train()
        trainer.log_file.write(
            step=step,
            held_out={name: round(value, 6) for name, value in measured.nats.items()},
            routing_entropy=measured.entropies,
        )

    def _keep(self, step: int) -> None:
        """Weights of a step that stay, and their held-out loss."""
        trainer = self.trainer
        measured = measure(trainer.net, self.held_out, trainer.args.per_device_train_batch_size)
        trainer.net.train()
        self.kept = [one for one in self.kept if one["step"] != step]
        self.kept.append({"step": step, "held_out": measured.nats})
        save_weights(
            trainer.net,
            self.tokenizer,
            self.folder / "checkpoints" / f"step-{step}",
            getattr(torch, trainer.recipe.dtype),
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Called by the Trainer when a checkpoint is written: adds what it does not know of.

        That file is the last one, so that a checkpoint which has it is whole.
        """
        if not processes.is_first():
            return
        totals = self.trainer.totals
        values = {
            "clock": self.trainer.clock.state(),
            "nats": [float(one) for one in totals.nats],
            "balance": [float(one) for one in totals.balance],
            "steps": totals.steps,
            "seconds": totals.seconds,
            "kept": self.kept,
        }
        path = self.folder / f"checkpoint-{state.global_step}" / STATE
        path.write_text(json.dumps(values), encoding="utf-8")

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint that `on_save` finished."""
        values = processes.by_the_first(
            lambda: json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        )
        trainer = self.trainer
        device = trainer.args.device
        trainer.clock.restore(values["clock"])
        trainer.totals = Totals(
            [torch.tensor(one, device=device) for one in values["nats"]],
            [torch.tensor(one, device=device) for one in values["balance"]],
            values["steps"],
            values["seconds"],
        )
        self.kept = values["kept"]
        trainer.log_file.cut(step_of(checkpoint))
