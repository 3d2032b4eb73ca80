"""One run: transformers' Trainer with our parts, from initial weights or from a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)

from smelt import processes
from smelt.checkpoint.device import denormals_as_zero
from smelt.train import distributed
from smelt.train.batches import Rows
from smelt.train.log import Log
from smelt.train.measure import HeldOut
from smelt.train.settings import TrainRecipe
from smelt.train.sharded import ShardedTrainer
from smelt.train.step import RunTrainer
from smelt.train.watch import OnStep, Watch


@dataclass(frozen=True)
class Ran:
    """What a run leaves beside its weights."""

    seconds: float  # evaluating and saving among them
    tokens_per_second: float  # without
    flops_per_token: float | None  # forward and backward; None: a stock family
    peak_flops: float | None
    mfu: float | None
    kept: list[dict[str, Any]]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    held_out: Sequence[HeldOut],
    recipe: TrainRecipe,
    folder: Path,
    checkpoint: Path | None,
    on_step: OnStep | None,
) -> Ran:
    """Train the model in place, from its weights or from a checkpoint of an earlier process.

    Args:
        model: with its initial weights.
        tokenizer: saved beside every checkpoint.
        rows: the training set.
        held_out: what is measured on the way.
        recipe: of the run.
        folder: gets `log.jsonl`, `checkpoint-N` to resume from, `checkpoints/step-N` to keep.
        checkpoint: a `checkpoint-N` of the folder to go on from.
        on_step: told step, steps and nats per token after every step.
    """
    log = Log(folder / "log.jsonl", with_tensorboard=recipe.tensorboard)
    kind = ShardedTrainer if distributed.is_divided(model) else RunTrainer
    trainer = kind(model, arguments(recipe, folder), rows, recipe, log)
    return carry_out(trainer, Watch(trainer, held_out, tokenizer, folder, on_step), checkpoint)


def arguments(recipe: TrainRecipe, folder: Path) -> TrainingArguments:
    """What the Trainer itself goes by."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size
        // (recipe.accumulate * processes.num_processes()),
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate},
        warmup_steps=recipe.warmup_steps,
        optim="adamw_torch_fused",
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_gradient_norm,
        seed=recipe.seed,
        activation_checkpointing=recipe.gradient_checkpointing,
        use_cache=True,  # of the configuration that is saved: our forward names it itself
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        # every micro-batch's gradient is divided at once: whole ones would not fit
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        use_cpu=not torch.cuda.is_available(),
    )


def carry_out(trainer: RunTrainer, watch: Watch, checkpoint: Path | None) -> Ran:
    """All steps of a trainer, or those after a checkpoint."""
    recipe = trainer.recipe
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    if checkpoint is not None:
        watch.restore(checkpoint)
    try:
        with denormals_as_zero():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        trainer.timer.stop()
        trainer.log_file.close()
    assert trainer.state.global_step == recipe.steps
    speed = recipe.steps * recipe.batch_size * recipe.sequence_length / trainer.clock.trained
    mfu = None
    if trainer.flops is not None and trainer.peak is not None:
        mfu = speed * trainer.flops / trainer.peak
    return Ran(trainer.clock.whole, speed, trainer.flops, trainer.peak, mfu, watch.kept)
