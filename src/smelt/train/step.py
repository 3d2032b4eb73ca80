"""A step of training: the Trainer with our loss, our order of batches and our log."""

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from smelt import processes
from smelt.text.spans import IGNORED
from smelt.train import distributed, losses
from smelt.train.batches import Order, Rows
from smelt.train.data import Example
from smelt.train.faults import DivergedError, first_fault
from smelt.train.log import Clock, Log, peak_memory_bytes
from smelt.train.measure import (
    Outputs,
    forward,
    is_samoe,
    num_choices,
    predicted,
    predicts_next,
)
from smelt.train.optimiser import decayed, hasten_embeddings
from smelt.train.profile import StepTimer, peak_flops, training_flops_per_token
from smelt.train.resume import last_checkpoint, step_of
from smelt.train.settings import TrainRecipe
from smelt.train.totals import Totals, details


@dataclass
class Step:
    """What the micro-batches of one step share."""

    batches: list[Example]
    num_predicted: Tensor  # over all micro-batches and processes
    counts: list[Tensor] | None = None  # per layer, choices of each expert; None: of the batch


class RunTrainer(Trainer):
    """The Trainer with our loss: nats per token plus each layer's own load balance.

    Nothing that is random is left to it: weights, masks and the order of batches follow from seeds.
    """

    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: Rows,
        recipe: TrainRecipe,
        log: Log,
    ) -> None:
        super().__init__(model, arguments, train_dataset=rows)
        self.net, self.rows, self.recipe, self.log_file = model, rows, recipe, log
        self.clock, self.totals = Clock(), Totals()
        self.is_summed = (recipe.balance or ("sum" if is_samoe(model) else "mean")) == "sum"
        self.num_choices = num_choices(model)
        self.predicts_next = predicts_next(model)
        self.step: Step | None = None
        self.last_nats = math.nan  # of the last step
        self.timer = StepTimer()
        self.phases: dict[str, float] = {}  # milliseconds of what a step does before its timer runs
        self.flops = training_flops_per_token(model.config, recipe)
        self.peak = peak_flops(recipe, arguments.device)
        if self.peak is not None:
            self.peak *= processes.num_processes()

    # --- what the Trainer asks for ---------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Example]:
        """The batches of all steps: one epoch of the Trainer's."""
        order = Order(
            len(self.rows),
            steps=self.recipe.steps,
            batch_size=self.recipe.batch_size,
            parts=self.recipe.accumulate,
            seed=self.recipe.seed,
            rank=processes.rank(),
            num_processes=processes.num_processes(),
            lengths=self.rows.lengths,
        )
        rows: Any = self.rows  # torch asks `__getitems__` for whole batches where there is one
        return DataLoader(rows, batch_sampler=order, collate_fn=_as_it_is)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters with weight decay."""
        return decayed(model)

    def create_optimizer(self, *arguments: Any, **named: Any) -> Any:
        """AdamW, its embeddings at their own rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*arguments, **named)
        if is_new:
            hasten_embeddings(optimizer, self.net, self.recipe.embedding_rate)
        return optimizer

    def floating_point_ops(self, inputs: Example) -> int:  # noqa: ARG002
        """Not counted here: counting parameters at every step takes time."""
        return 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[Example], num_batches: int, device: torch.device
    ) -> tuple[list[Example], None]:
        """The micro-batches of a step; what they share is reckoned here."""
        begin = time.perf_counter()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        known = sum(
            int((predicted(batch, is_causal=self.predicts_next) != IGNORED).sum())
            for batch in batches
        )
        (num_predicted,) = processes.total([torch.tensor(known, device=device)])
        self.step = Step(batches, num_predicted)
        drawn = time.perf_counter()
        if len(batches) > 1 and self.recipe.router_aux_loss:
            self.step.counts = self._counts(batches)
        self.phases = {
            "data": round(1e3 * (drawn - begin), 3),
            "shares": round(1e3 * (time.perf_counter() - drawn), 3),
        }
        return batches, None

    @torch.no_grad()
    def _counts(self, batches: Sequence[Example]) -> list[Tensor]:
        """The experts' load over a whole step, before its first micro-batch is trained on.

        The balance is a product of means over the whole step, so that each part needs it.
        """
        self.net.train()
        counts: list[Tensor] = []
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # dropout falls the same way when it is trained on
            for batch in batches:
                with self._autocast():
                    outputs = forward(self.net, self._prepare_inputs(batch))
                new = [p.counts for p in losses.routed(outputs.router_logits, self.num_choices)]
                counts = [a + b for a, b in zip(counts, new, strict=True)] if counts else new
        return processes.total(counts)

    def _autocast(self) -> torch.autocast:
        is_low = self.recipe.precision == "bfloat16"
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=is_low)

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """Forward and backward of a micro-batch."""
        loss = super().training_step(*arguments, **named)
        self.timer.lap("other")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last moment before the weights change: a step that is not finite ends the run here.

        The one place in a step where the GPU is waited for.
        """
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        self._sum_over_processes()
        nats = torch.stack(self.totals.nats[-self.recipe.accumulate :]).sum()
        self.totals.gradient_norm = float(distributed.whole(norm))
        self.last_nats = float(nats)
        if not math.isfinite(self.totals.gradient_norm) or not math.isfinite(self.last_nats):
            self._stop()
        return norm

    def _sum_over_processes(self) -> None:
        """Make the losses of this step, until now of this process's tokens, those of the whole."""
        parts, totals = self.recipe.accumulate, self.totals
        for values in (totals.nats, totals.balance):
            values[-parts:] = processes.total([torch.stack(values[-parts:])])[0].unbind()

    def _stop(self) -> None:
        assert self.step is not None
        step, totals = self.state.global_step + 1, self.totals
        what = f"the loss is {self.last_nats}"
        if math.isfinite(self.last_nats):
            what = f"the norm of the gradient is {totals.gradient_norm}"
        where = ""
        if processes.num_processes() == 1:  # the step is run again, in which others took part
            where = ", first seen " + first_fault(
                self.net,
                self.step.batches,
                lambda batch: self.compute_loss(self.net, self._prepare_inputs(batch)),
            )
        folder = Path(self.args.output_dir or ".")
        checkpoint = last_checkpoint(folder)
        kept = "There was no checkpoint yet: lower learning_rate or lengthen warmup_steps."
        if checkpoint is not None:
            kept = (
                f"The last checkpoint, of step {step_of(checkpoint)}, is kept in {checkpoint}. "
                "Lower learning_rate or lengthen warmup_steps, and name another output or remove "
                f"{folder.parent} first."
            )
        raise DivergedError(f"Training stopped at step {step}: {what}{where}. {kept}")

    def compute_loss(  # type: ignore[override]
        self, model: PreTrainedModel, inputs: Example, *_: Any, **__: Any
    ) -> Tensor:
        """This micro-batch's part of the step's loss."""
        assert self.step is not None
        recipe, totals = self.recipe, self.totals
        with self._autocast():
            outputs = forward(model, inputs)
        loss, nats = self.loss_of(outputs, self.step.num_predicted)
        balance = nats.new_zeros(())
        if outputs.router_logits:
            with_z = bool(recipe.router_z_loss)
            parts = losses.routed(outputs.router_logits, self.num_choices, with_z=with_z)
            counts = self.step.counts or processes.total([part.counts for part in parts])
            balances = torch.stack(
                [
                    losses.layer_balance(part, whole, self.num_choices)
                    for part, whole in zip(parts, counts, strict=True)
                ]
            )
            balance = balances.sum() if self.is_summed else balances.mean()
            loss = loss + recipe.router_aux_loss * balance
            if with_z:
                z = torch.stack(
                    [
                        part.squared_log_z * self.num_choices / whole.sum()
                        for part, whole in zip(parts, counts, strict=True)
                    ]
                )
                loss = loss + recipe.router_z_loss * (z.sum() if self.is_summed else z.mean())
            totals.counts, totals.balances = counts, balances.detach()
            totals.dropped = outputs.dropped
        elif recipe.router_aux_loss and not is_samoe(self.net):
            self._warn_once()
        totals.nats.append(nats.detach())
        totals.balance.append(balance.detach())
        # The gradients of processes are averaged; the parts of a step are summed.
        return loss * processes.num_processes()

    def loss_of(self, outputs: Outputs, num_predicted: Tensor) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of what is learnt, without the balance; of it, the nats."""
        nats = losses.token_loss(outputs.logits, outputs.target, num_predicted)
        return nats, nats

    def further(self) -> dict[str, Any]:
        """What a line of the log has beside the rest, of the steps since the last line."""
        return {}

    def _warn_once(self) -> None:
        if self.state.global_step == 0:
            warnings.warn(
                f"{self.net.config.model_type} does not give its router logits: router_aux_loss "
                "is left out.",
                stacklevel=2,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002
        """Called by the Trainer every `log_every` steps, and once at the end."""
        if "grad_norm" not in logs:  # the Trainer's summary at the end
            return
        totals, recipe, step = self.totals, self.recipe, self.state.global_step
        sums = torch.stack([torch.stack(totals.nats).sum(), torch.stack(totals.balance).sum()])
        nats, balance = (sums / totals.steps).tolist()
        seconds = self.clock.trained
        each = (seconds - totals.seconds) / totals.steps
        tokens = recipe.batch_size * recipe.sequence_length
        values: dict[str, Any] = {
            "step": step,
            "tokens": step * tokens,
            "nats": nats,
            "balance": balance,
            **self.further(),
            "gradient_norm": totals.gradient_norm,
            "learning_rate": logs["learning_rate"],
            "tokens_per_second": round(tokens / each, 1),
            "milliseconds": round(1e3 * each, 2),
            "peak_memory_bytes": peak_memory_bytes(),
            "seconds": round(self.clock.whole, 1),
        }
        if self.flops is not None and self.peak is not None:
            values["mfu"] = round(tokens / each * self.flops / self.peak, 4)
        if (step // recipe.log_every) % recipe.details_every == 0:
            values |= details(totals, self.net)
        self.log_file.write(**values)
        self.totals = Totals(seconds=seconds)

    # --- going on --------------------------------------------------------------------------------

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """The weights of a checkpoint, in whatever layout the family saves them.

        The Trainer's own reads the tensors as they lie on disk, which leaves fused experts at their
        initial values.
        """
        loaded = type(self.net).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        (model or self.net).load_state_dict(loaded.state_dict(), strict=True)


def _as_it_is(batch: Any) -> Any:
    return batch
