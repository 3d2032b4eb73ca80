"""`train`: a recipe's model, trained by transformers' Trainer, saved as an ordinary checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from smelt import processes
from smelt.checkpoint.source import Checkpoint
from smelt.errors import RecipeError
from smelt.outputs import check_writable
from smelt.settings import expand_environment
from smelt.train import distributed
from smelt.train.build import build_model
from smelt.train.card import training_card
from smelt.train.checkpoints import write
from smelt.train.examples import training_data
from smelt.train.faults import disk_may_fill
from smelt.train.log import check_tensorboard, peak_memory_bytes
from smelt.train.measure import num_choices, report
from smelt.train.resume import begin, last_checkpoint
from smelt.train.run import Ran, run
from smelt.train.seeds import finished, of_seed, summary
from smelt.train.settings import TrainRecipe
from smelt.train.shards import find_tokenizer, tokenizer_sha256
from smelt.train.task_examples import TrainingSet
from smelt.train.watch import OnStep

__all__ = ["TrainRecipe", "train"]


def train(recipe: TrainRecipe, *, on_step: OnStep | None = None) -> dict[str, Any]:
    """Train the recipe's model, save it as an ordinary checkpoint, and return what it reached.

    The output folder gets the weights, the tokenizer, and in `smelt/` the recipe, the training log
    (`log.jsonl`), the last checkpoints (`checkpoints/step-N`), and `training.json`, which is also
    the value returned. Until then all of it is in `OUTPUT.partial`; the same call after a kill goes
    on there, with the same result as if nothing had happened.

    Args:
        recipe: everything that decides the result.
        on_step: called after every step with its number, the number of all, and nats per token.

    Raises:
        RecipeError: a setting that does not fit, an output folder that exists, an unfinished run of
            another recipe or text, a loss that is no number.
        CalibrationError: text that cannot be read.
    """
    processes.meet()
    distributed.check_batch(recipe.batch_size, recipe.accumulate)
    if recipe.tensorboard:
        check_tensorboard()
    if recipe.seeds is None:
        return _train_one(recipe, on_step)
    output = Path(expand_environment(recipe.output)).expanduser()
    if (output / "config.json").exists():
        raise RecipeError(
            f"{output}: holds a run of one seed. Name another folder for several, or remove it."
        )
    recipes = [of_seed(recipe, seed) for seed in recipe.seeds]
    results = {one.seed: finished(output / f"seed-{one.seed}", one) for one in recipes}
    for place, one in enumerate(recipes):
        if results[one.seed] is None:
            results[one.seed] = _train_one(one, _within(on_step, place, len(recipes)))
    together = summary({seed: found for seed, found in results.items() if found is not None})
    if processes.is_first():
        spelt = json.dumps(together, indent=1, ensure_ascii=False) + "\n"
        (output / "summary.json").write_text(spelt, encoding="utf-8")
    return together


def _within(on_step: OnStep | None, place: int, number: int) -> OnStep | None:
    """The progress of one run of several, as that of all."""
    if on_step is None:
        return None
    return lambda step, steps, nats: on_step(place * steps + step, number * steps, nats)


def _train_one(recipe: TrainRecipe, on_step: OnStep | None) -> dict[str, Any]:
    output = Path(expand_environment(recipe.output)).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"{output}: exists already. Name another folder, or remove this one.")
    check_writable(output, "folder")
    if recipe.start is not None:
        Checkpoint.open(expand_environment(recipe.start))  # else its tokenizer is what is missed
    tokenizer = processes.in_turn(
        lambda: find_tokenizer(
            recipe.tokenizer, recipe.text, with_mask=recipe.objective == "masked"
        )
    )
    set_seed(recipe.seed)
    model = distributed.build(
        lambda: build_model(recipe, tokenizer), is_low=recipe.precision == "bfloat16"
    )
    num_choices(model)  # a stock model without experts is refused here
    data = training_data(recipe, model, tokenizer)
    hashes = {
        "the tokenizer": tokenizer_sha256(tokenizer),
        "the training text": data.sha256,
        **{f"held-out text {one.name}": one.blocks.sha256 for one in data.held_out},
    }
    partial = output.with_name(output.name + ".partial")
    checkpoint = processes.by_the_first(lambda: begin(partial, recipe, hashes))
    try:
        with disk_may_fill(partial):
            ran = run(
                model,
                tokenizer,
                data.rows,
                data.held_out,
                recipe,
                partial / "smelt",
                checkpoint,
                on_step,
            )
            peak = peak_memory_bytes()
            dtype = getattr(torch, recipe.dtype)
            write(model, tokenizer, partial, dtype)
            distributed.round_to(model, dtype)
            result = _result(recipe, model, data, ran, peak)
            if processes.is_first():
                spelt = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
                (partial / "smelt" / "training.json").write_text(spelt, encoding="utf-8")
                text = training_card(output.name, model, result)
                (partial / "README.md").write_text(text, encoding="utf-8")
                _finish(partial, output)
    except BaseException:
        if processes.is_first() and last_checkpoint(partial / "smelt") is None:
            # nothing to go on from
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


def _result(
    recipe: TrainRecipe, model: PreTrainedModel, data: TrainingSet, ran: Ran, peak: int
) -> dict[str, Any]:
    """What training.json says; the model's weights are as they were saved."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": recipe.steps,
        "tokens_trained": recipe.steps * recipe.batch_size * recipe.sequence_length,
        "distinct_tokens": data.distinct_tokens,
        "seconds": round(ran.seconds, 1),
        "tokens_per_second": round(ran.tokens_per_second, 1),
        "training_flops_per_token": ran.flops_per_token,
        "peak_flops": ran.peak_flops,
        "mfu": ran.mfu,
        "peak_memory_bytes": peak,
        "train_text_sha256": data.sha256,
        **({} if data.task is None else {"task": data.task}),
        # in float32, of the weights as they were saved
        **report(model, data.counts, data.held_out, recipe.batch_size // processes.started()),
        "checkpoints": ran.kept,  # in float32, of the weights before they were saved
    }


def _finish(partial: Path, output: Path) -> None:
    """The folder under its name, without what only a resume needs."""
    if output.exists():
        output.rmdir()
    partial.rename(output)
    (output / "smelt" / "started.json").unlink()
    for path in (output / "smelt").glob("checkpoint-*"):
        shutil.rmtree(path)
