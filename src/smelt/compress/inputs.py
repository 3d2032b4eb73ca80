"""What a checkpoint is calibrated on: a text or a task, as batches of its own tokens."""

from smelt import processes
from smelt.checkpoint.inputs import Batch, make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.task_batches import task_batches
from smelt.errors import CalibrationError
from smelt.recipe import CalibrationRecipe
from smelt.text import TokenBlocks, parse_source, tokenize


def read_text(checkpoint: Checkpoint, recipe: CalibrationRecipe) -> TokenBlocks:
    """The calibration text of a recipe as token blocks of this checkpoint's tokenizer.

    Raises:
        CalibrationError: text that cannot be read, token ids beyond the model's vocabulary, or a
            recipe of a task, which is no text.
    """
    if recipe.task is not None:
        raise CalibrationError(
            f"task {recipe.task.name}: a text is read here. Leave task out, and name a text."
        )
    blocks = tokenize(
        [parse_source(source) for source in recipe.text],
        checkpoint.tokenizer,
        num_tokens=recipe.num_tokens,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        chat_template=recipe.chat_template,
    )
    check_vocabulary(checkpoint, int(blocks.input_ids.max()))
    return blocks


def read_inputs(checkpoint: Checkpoint, recipe: CalibrationRecipe) -> tuple[list[Batch], str]:
    """What a checkpoint is calibrated on, and its hash: a text, or the examples of a task."""
    if recipe.task is not None:
        batches, sha256 = task_batches(checkpoint, recipe.task, recipe.batch_size, recipe.seed)
        ids = [tensor for batch in batches for n, tensor in batch.inputs.items() if "ids" in n]
        check_vocabulary(checkpoint, max(int(tensor.max()) for tensor in ids))
    else:
        blocks = read_text(checkpoint, recipe)
        batches = make_batches(checkpoint, blocks, recipe.batch_size, recipe.seed)
        sha256 = blocks.sha256
    if len(batches) < processes.num_processes():
        raise CalibrationError(
            f"{len(batches)} batches of calibration cannot be shared out among "
            f"{processes.num_processes()} processes. Calibrate on more, in smaller batches "
            "(calibration.batch_size), or start fewer."
        )
    return batches, sha256


def check_vocabulary(checkpoint: Checkpoint, largest: int) -> None:
    """A token id that the model does not have is a CalibrationError."""
    vocabulary = checkpoint.config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise CalibrationError(
            f"{checkpoint.folder}: the tokenizer gives id {largest}, the model has {vocabulary} "
            "tokens. Tokenizer and weights are of different models."
        )
