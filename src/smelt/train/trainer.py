"""`train`: a recipe's model, trained by transformers' Trainer, saved as an ordinary checkpoint."""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from smelt.errors import RecipeError
from smelt.recipe import dump_recipe, expand_environment
from smelt.text import TokenBlocks, tokenize
from smelt.text.sources import TextSource
from smelt.text.spans import sentinels, span_corruption
from smelt.train import losses
from smelt.train.build import build_model
from smelt.train.data import (
    Example,
    next_token_examples,
    train_tokenizer,
)
from smelt.train.measure import HeldOut, forward, measure, num_choices, report
from smelt.train.settings import TrainRecipe

__all__ = ["TrainRecipe", "train"]

logger = logging.getLogger(__name__)


def train(
    recipe: TrainRecipe, *, on_step: Callable[[int, int, float], None] | None = None
) -> dict[str, Any]:
    """Train the recipe's model, save it as an ordinary checkpoint, and return what it reached.

    The output folder gets the weights, the tokenizer, and in `smelt/` the recipe, the training
    log (`log.jsonl`) and `training.json`, which is also the value returned.

    Args:
        recipe: everything that decides the result.
        on_step: called after every step with its number, the number of all, and nats per token.

    Raises:
        RecipeError: a setting that does not fit, or an output folder that exists.
        CalibrationError: text that cannot be read.
    """
    output = Path(expand_environment(recipe.output)).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"{output}: exists already. Name another folder, or remove this one.")
    set_seed(recipe.seed)
    tokenizer = _tokenizer(recipe)
    model = build_model(
        recipe.model,
        tokenizer,
        sequence_length=recipe.text.sequence_length,
        router_aux_loss=recipe.router_aux_loss,
    )
    num_choices(model)  # a model without experts is refused here
    blocks = _tokens(recipe.text.train, tokenizer, recipe, recipe.text.tokens)
    examples = _examples(blocks, model, tokenizer, recipe)
    held_out = []
    for source in recipe.text.held_out:
        cut = _tokens([source], tokenizer, recipe, recipe.text.held_out_tokens)
        held_out.append(HeldOut(str(source), _examples(cut, model, tokenizer, recipe), cut))
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "smelt").mkdir(parents=True)
    try:
        begin = time.perf_counter()
        _run(model, examples, held_out, recipe, partial, on_step)
        seconds = time.perf_counter() - begin
        model.to(getattr(torch, recipe.dtype))
        model.config.use_cache = True  # the Trainer turns it off for itself
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        dump_recipe(recipe, partial / "smelt" / "recipe.yaml")
        trained = recipe.steps * recipe.batch_size * recipe.text.sequence_length
        result = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": recipe.steps,
            "tokens_trained": trained,
            "distinct_tokens": blocks.num_tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(trained / seconds, 1),
            "train_text_sha256": blocks.sha256,
            # in float32, of the weights as they were saved
            **report(model.float(), examples, held_out, recipe.batch_size),
        }
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        (partial / "smelt" / "training.json").write_text(text, encoding="utf-8")
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


class _MoeTrainer(Trainer):
    """The Trainer with our loss: nats per token plus each layer's own load balance."""

    balance = 0.0
    num_choices = 1
    nats: list[Tensor]  # of the batches since the last line of the log, load balance not counted

    def compute_loss(  # type: ignore[override]
        self, model: PreTrainedModel, inputs: Example, *_: Any, **__: Any
    ) -> Tensor:
        logits, target, router_logits = forward(model, inputs)
        loss = losses.token_loss(logits, target)
        self.nats.append(loss.detach())
        if self.balance and router_logits:
            return loss + self.balance * losses.load_balance(router_logits, self.num_choices)
        if self.balance:
            warnings.warn(
                f"{model.config.model_type} does not give its router logits: router_aux_loss is "
                "left out.",
                stacklevel=2,
            )
            self.balance = 0.0
        return loss


class _Log(TrainerCallback):
    """One JSON line per so many steps, and per evaluation."""

    def __init__(
        self,
        path: Path,
        trainer: _MoeTrainer,
        held_out: Sequence[HeldOut],
        on_step: Callable[[int, int, float], None] | None,
    ) -> None:
        self.path, self.trainer, self.on_step = path, trainer, on_step
        self.few = [HeldOut(one.name, one.examples[:64], one.blocks) for one in held_out]
        self.begin = time.perf_counter()

    def _write(self, **values: Any) -> None:
        line = json.dumps({**values, "seconds": round(time.perf_counter() - self.begin, 1)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        logger.info("%s", line)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:  # noqa: ARG002
        step, model = state.global_step, objects["model"]
        if self.on_step is not None:
            self.on_step(step, args.max_steps, float(self.trainer.nats[-1]))
        if step % args.logging_steps == 0:
            nats = float(torch.stack(self.trainer.nats).mean())
            self.trainer.nats.clear()
            rate = objects["lr_scheduler"].get_last_lr()[0]
            self._write(step=step, nats=round(nats, 4), learning_rate=rate)
        if step % args.eval_steps == 0:
            measured = measure(model, self.few, args.per_device_train_batch_size)
            model.train()
            self._write(
                step=step,
                held_out={name: round(value, 4) for name, value in measured.nats.items()},
                routing_entropy=measured.entropies,
            )


def _run(
    model: PreTrainedModel,
    examples: list[Example],
    held_out: Sequence[HeldOut],
    recipe: TrainRecipe,
    folder: Path,
    on_step: Callable[[int, int, float], None] | None,
) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder / "smelt"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_gradient_norm,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        eval_steps=recipe.evaluate_every,
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=len(examples) >= recipe.batch_size,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = _MoeTrainer(model, arguments, train_dataset=examples)
    trainer.nats = []
    trainer.balance = recipe.router_aux_loss
    trainer.num_choices = num_choices(model)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Log(folder / "smelt" / "log.jsonl", trainer, held_out, on_step))
    trainer.train()


def _tokenizer(recipe: TrainRecipe) -> PreTrainedTokenizerBase:
    settings = recipe.tokenizer
    if settings.vocab_size is not None:
        return train_tokenizer(
            recipe.text.train,
            vocab_size=settings.vocab_size,
            num_sentinels=settings.sentinels,
            seed=recipe.seed,
        )
    folder = expand_environment(settings.folder or "")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"tokenizer.folder = {folder!r} holds no tokenizer ({reason}). Name a folder with "
            "tokenizer.json, or give tokenizer.vocab_size to fit one."
        ) from None


def _tokens(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    recipe: TrainRecipe,
    num_tokens: int,
) -> TokenBlocks:
    return tokenize(
        sources,
        tokenizer,
        num_tokens=num_tokens,
        sequence_length=recipe.text.sequence_length,
        seed=recipe.seed,
    )


def _examples(
    blocks: TokenBlocks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TrainRecipe,
) -> list[Example]:
    if not model.config.is_encoder_decoder:
        return next_token_examples(blocks)
    marks = sentinels(tokenizer)
    if len(marks) < 2:
        raise RecipeError(
            f"{recipe.model.model_type} is trained by span corruption, and the tokenizer has "
            f"{len(marks)} tokens <extra_id_N>. Set tokenizer.sentinels, e.g. to 32."
        )
    return span_corruption(
        blocks,
        sentinel_ids=marks,
        density=recipe.spans.density,
        mean_span=recipe.spans.mean_span,
        seed=recipe.seed,
        pad_id=int(model.config.pad_token_id),
        start_id=int(model.config.decoder_start_token_id),
    ).examples()
