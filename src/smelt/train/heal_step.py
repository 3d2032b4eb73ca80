"""A step of healing: the run's trainer with a teacher's part in the loss, and rows of S that go."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from smelt.train.data import Example
from smelt.train.distill import distillation
from smelt.train.heal_rows import PrunedRows
from smelt.train.heal_settings import DistillSettings
from smelt.train.log import Log
from smelt.train.measure import Outputs
from smelt.train.settings import TrainRecipe
from smelt.train.step import RunTrainer
from smelt.train.teacher import NUMBERS, NumberedRows, Teacher

TRAINED, ROWS, SUMS = "trained.safetensors", "rows.safetensors", "sums.json"
"""In a checkpoint to resume from: the parameters that are trained (the others are the student's),
importances and masks, sums of the log."""


@dataclass(frozen=True)
class Healing:
    """What healing adds to a training run."""

    settings: DistillSettings
    teacher: Teacher | None  # None: cross-entropy alone
    rows: PrunedRows | None  # None: nothing is pruned


class HealTrainer(RunTrainer):
    """The run's trainer, its loss that of distillation."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: NumberedRows,
        recipe: TrainRecipe,
        log: Log,
        healing: Healing,
    ) -> None:
        super().__init__(model, arguments, rows, recipe, log)
        self.healing = healing
        self.batch: Example = {}  # the one at hand, as the teacher is asked for it
        self.divergences: list[float | Tensor] = []  # mean KL of the steps since the last line
        if healing.rows is not None:
            self.add_callback(_Pruning(healing.rows))

    def compute_loss(  # type: ignore[override]
        self, model: PreTrainedModel, inputs: Example, *_: Any, **__: Any
    ) -> Tensor:
        """This micro-batch's part of the step's loss."""
        self.batch = inputs
        if self.healing.settings.is_faithful:
            model.eval()  # its dropout is off
        student = {name: value for name, value in inputs.items() if name != NUMBERS}
        return super().compute_loss(model, student)

    def loss_of(self, outputs: Outputs, num_predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and KL of this micro-batch, as parts of the step's; of it, the nats."""
        own, teacher = self.healing.settings, self.healing.teacher
        compared = self.recipe.batch_size if own.is_faithful else num_predicted
        found = distillation(
            outputs.logits.flatten(0, 1),
            outputs.target.flatten(),
            None if teacher is None else teacher.of(self.batch),
            temperature=own.temperature,
            cross_entropy_scale=own.cross_entropy / num_predicted,
            divergence_scale=own.weight / compared,
            everywhere=own.is_faithful,
        )
        self.divergences.append(found.divergence.detach() / compared)
        return found.loss, found.cross_entropy.detach() / num_predicted

    def further(self) -> dict[str, Any]:
        """The KL of a line of the log, at the temperature, and the share of S that stays."""
        values: dict[str, Any] = {}
        if self.healing.teacher is not None:
            values["kl"] = sum(map(float, self.divergences)) / self.totals.steps
        if self.healing.rows is not None:
            values["kept"] = round(self.healing.rows.share, 6)
        self.divergences = []
        return values

    def _counts(self, batches: Any) -> list[Tensor]:
        plain = [{n: value for n, value in b.items() if n != NUMBERS} for b in batches]
        return super()._counts(plain)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The gradients of the step are there, and nothing was done with them yet."""
        if self.healing.rows is not None:
            self.healing.rows.observe()
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    # --- checkpoints -----------------------------------------------------------------------------

    def _save(
        self,
        output_dir: str | None = None,
        state_dict: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> None:
        """What is trained, in float32; what is not is the student's."""
        assert output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach() for n, p in self.net.named_parameters() if p.requires_grad}
        save_file(trained, folder / TRAINED)
        if self.healing.rows is not None:
            save_file(self.healing.rows.state(), folder / ROWS)
        sums = {"divergences": [float(one) for one in self.divergences]}
        (folder / SUMS).write_text(json.dumps(sums), encoding="utf-8")

    def _load_from_checkpoint(
        self,
        resume_from_checkpoint: str,
        model: nn.Module | None = None,  # noqa: ARG002
    ) -> None:
        """The weights, importances and masks of a checkpoint."""
        folder = Path(resume_from_checkpoint)
        trained = load_file(folder / TRAINED)
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(trained.pop(name))
        assert not trained, list(trained)
        if self.healing.rows is not None:
            self.healing.rows.restore(load_file(folder / ROWS))
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        self.divergences = list(sums["divergences"])


class _Pruning(TrainerCallback):
    """Masks act on the weights when the optimiser has changed them."""

    def __init__(self, rows: PrunedRows) -> None:
        self.rows = rows

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Called by the Trainer; its count of steps is one behind here."""
        self.rows.prune(state.global_step + 1)
