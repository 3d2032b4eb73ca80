"""`heal`: a compressed checkpoint trained back towards its original, saved in the form it has."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from smelt import processes
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.compress.calibrate import Progress
from smelt.errors import RecipeError
from smelt.outputs import check_writable
from smelt.settings import expand_environment
from smelt.train.batches import ExampleRows, Rows
from smelt.train.cache import cache_folder
from smelt.train.examples import training_data
from smelt.train.faults import disk_may_fill
from smelt.train.heal_cache import keep_predictions
from smelt.train.heal_measure import Compared, compare
from smelt.train.heal_model import Lora, check_pair, choose_trained
from smelt.train.heal_output import finish, saved_type, write_weights
from smelt.train.heal_rows import PrunedRows
from smelt.train.heal_settings import HealRecipe
from smelt.train.heal_step import Healing, HealTrainer
from smelt.train.log import Log, peak_memory_bytes
from smelt.train.resume import begin, last_checkpoint
from smelt.train.run import Ran, arguments, carry_out
from smelt.train.settings import TrainRecipe
from smelt.train.shards import tokenizer_sha256
from smelt.train.task_examples import TrainingSet
from smelt.train.teacher import CachedTeacher, LiveTeacher, NumberedRows, Teacher
from smelt.train.watch import OnStep, Watch

__all__ = ["HealRecipe", "heal"]

BEFORE = "before.json"  # in an unfinished run: what the student was measured at


def _silent(_: str) -> Progress:
    return lambda *_: None


def heal(
    recipe: HealRecipe,
    *,
    on_step: OnStep | None = None,
    stages: Callable[[str], Progress] = _silent,
) -> dict[str, Any]:
    """Train the recipe's student towards its teacher, save it in its own form, return what it got.

    The output folder holds the weights in the student's form (compact, where rows of S were
    pruned), everything that lay beside them, and in `smelt/` the recipe (`heal.yaml`), the log
    (`heal-log.jsonl`) and `healing.json`, which is also the value returned. Until then all of it is
    in `OUTPUT.partial`; the same call after a kill goes on there, with the same result as if
    nothing had happened. What is saved is the last step, never picked by what is reported.

    Args:
        recipe: everything that decides the result.
        on_step: called after every step with its number, the number of all, and nats per token.
        stages: told of the progress of making the teacher's predictions.

    Raises:
        RecipeError: settings that do not fit the student or each other, an output that exists, an
            unfinished run of another recipe, a loss or an importance that is no number.
        CheckpointError: a checkpoint that cannot be read; a teacher with another tokenizer.
        CalibrationError: text that cannot be read; kept predictions of another text or teacher.
    """
    if processes.started() > 1:
        raise RecipeError("smelt heal runs in one process: start it without torchrun.")
    output = Path(expand_environment(recipe.output)).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"{output}: exists already. Name another folder, or remove this one.")
    check_writable(output, "folder")
    student, teacher = (_opened(one, recipe) for one in (recipe.student, recipe.teacher))
    check_pair(student, teacher)
    dtype = saved_type(student, recipe.dtype)
    loop = recipe.loop()
    set_seed(recipe.seed)
    model = load_model(student).float()
    lora, rows = prepare(model, student, recipe)
    data = training_data(loop, model, student.tokenizer)  # of a text or of a task
    hashes = {
        "the tokenizer": tokenizer_sha256(student.tokenizer),
        "the training text": data.sha256,
        **{f"held-out text {one.name}": one.blocks.sha256 for one in data.held_out},
        "the student": student.fingerprint,
        "the teacher": teacher.fingerprint,
    }
    partial = output.with_name(output.name + ".partial")
    checkpoint = begin(partial, recipe, hashes)
    try:
        with disk_may_fill(partial):
            ours, sets = teachers(
                recipe, teacher, data, tokenizer_sha256(student.tokenizer), stages
            )
            size = recipe.batch_size // recipe.accumulate
            before = _before(partial / "smelt" / BEFORE, lambda: compare(model, sets, size))
            healing = Healing(recipe.distill, ours if recipe.distill.weight else None, rows)
            ran = _run(model, data, loop, healing, partial / "smelt", checkpoint, on_step, student)
            peak = peak_memory_bytes()
            if lora is not None:
                lora.merge()
            if rows is not None:
                rows.close()
            write_weights(model, student, partial, dtype, keep_types=recipe.dtype is None)
            result = {
                "student": _named(student),
                "teacher": _named(teacher),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "parameters_trained": ran.trained,
                "steps": recipe.steps,
                "tokens_trained": recipe.steps * recipe.batch_size * loop.sequence_length,
                "seconds": round(ran.ran.seconds, 1),
                "tokens_per_second": round(ran.ran.tokens_per_second, 1),
                "peak_memory_bytes": peak,
                "kl": "of the whole vocabulary" if recipe.cache is None else _bound(recipe),
                "before": before,
                "after": compare(_placed(model), sets, size),  # of the weights as they are saved
                "hashes": hashes,
            }
            finish(student, partial, output, result)
    except BaseException:
        if last_checkpoint(partial / "smelt") is None:  # nothing to go on from
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


def _opened(source: str, recipe: HealRecipe) -> Checkpoint:
    return Checkpoint.open(expand_environment(source), trust_remote_code=recipe.trust_remote_code)


def _named(checkpoint: Checkpoint) -> dict[str, str]:
    return {"name": checkpoint.folder.name, "fingerprint": checkpoint.fingerprint}


def _bound(recipe: HealRecipe) -> str:
    assert recipe.cache is not None
    return f"of the teacher's {recipe.cache.top_k} likeliest tokens and the rest: a lower bound"


def _before(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured when the run began, also after it is gone on with."""
    if not path.is_file():
        path.write_text(json.dumps(measure()), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    """Where it runs: on the GPU, if there is one."""
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    return model


# --- who teaches ---------------------------------------------------------------------------------


def teachers(
    recipe: HealRecipe,
    teacher: Checkpoint,
    data: TrainingSet,
    tokenizer: str,
    stages: Callable[[str], Progress] = _silent,
) -> tuple[Teacher, list[Compared]]:
    """The teacher of the training set, and those of the held-out texts.

    A live one is the same model for all; kept predictions are made here, before training begins,
    one folder for each set.

    Args:
        recipe: of the run.
        teacher: the original.
        data: of the run.
        tokenizer: its hash.
        stages: told of the progress.
    """
    if recipe.cache is None:
        live = LiveTeacher(_placed(load_model(teacher)))
        return live, [Compared(one, live) for one in data.held_out]
    own = recipe.cache
    folder = cache_folder(own.folder or (recipe.text.cache if recipe.text else None))

    def kept(rows: Rows, role: str) -> CachedTeacher:
        found = keep_predictions(
            teacher,
            rows,
            own,
            temperature=recipe.distill.temperature,
            tokenizer_sha256=tokenizer,
            folder=folder / role if own.folder else folder,
            is_named=own.folder is not None,
            progress=stages("asking the teacher"),
        )
        return CachedTeacher(found)

    sets = [
        Compared(one, kept(ExampleRows(one.examples), f"held-out-{place}"))
        for place, one in enumerate(data.held_out)
    ]
    # Without a part in the loss, nothing is asked of the teacher on the training set.
    return (kept(data.rows, "train") if recipe.distill.weight else sets[0].teacher), sets


# --- how it is trained ---------------------------------------------------------------------------


def prepare(
    model: PreTrainedModel, student: Checkpoint, recipe: HealRecipe
) -> tuple[Lora | None, PrunedRows | None]:
    """What the recipe adds to the student, and which of its parameters are trained.

    Raises:
        RecipeError: a rank too high, a student that is not mapped, PEFT is missing, …
    """
    rows = None
    if recipe.decompose is not None:
        rows = PrunedRows(model, recipe.decompose, recipe.steps)
    lora = Lora(model, student, recipe.lora) if recipe.train == "lora" else None
    choose_trained(model, student, recipe)
    return lora, rows


@dataclass(frozen=True)
class _Ran:
    ran: Ran
    trained: int  # parameters


def _run(
    model: PreTrainedModel,
    data: TrainingSet,
    loop: TrainRecipe,
    healing: Healing,
    folder: Path,
    checkpoint: Path | None,
    on_step: OnStep | None,
    student: Checkpoint,
) -> _Ran:
    """All steps, or those after a checkpoint."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log = Log(folder / "log.jsonl")
    rows = NumberedRows(data.rows)
    trainer = HealTrainer(model, arguments(loop, folder), rows, loop, log, healing)
    watch = Watch(trainer, data.held_out, student.tokenizer, folder, on_step)
    watch.keep_steps = set()  # what is saved is the last step
    return _Ran(carry_out(trainer, watch, checkpoint), trained)
