"""Training examples of a benchmark as calibration inputs: the encoder reads the task's input, the
decoder its target, as in fine-tuning.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CalibrationError
from smelt.recipe import CalibrationTask
from smelt.text.spans import IGNORED
from smelt.text2text.encode import Encoded, Encoder
from smelt.text2text.files import read_items
from smelt.text2text.tasks import TASKS


def task_batches(
    checkpoint: Checkpoint, task: CalibrationTask, batch_size: int, seed: int = 0
) -> tuple[list[Batch], str]:
    """Examples of the training split in batches, padded on both sides, and a hash of all tokens.

    Args:
        checkpoint: an encoder–decoder with a tokenizer.
        task: which benchmark, and how much of it. SMELT_DATA names the folder of files.
        batch_size: examples of a batch; no number that is added up depends on it.
        seed: draws the examples.

    Raises:
        CalibrationError: the checkpoint is no encoder–decoder.
        RecipeError: no such task, no folder of files.
        SmeltError: a line of a file is no question.
    """
    config = checkpoint.config
    if not config.is_encoder_decoder:
        raise CalibrationError(
            f"{checkpoint.folder}: {config.model_type} is no encoder–decoder, and task "
            f"{task.name} is text to text. Calibrate it on a text: --text."
        )
    items = read_items(task.name, "train").items
    known = TASKS[task.name]
    if task.limit is not None and task.limit < len(items):
        drawn = np.random.default_rng(seed).permutation(len(items))[: task.limit]
        items = tuple(items[i] for i in sorted(drawn.tolist()))
    encoder = Encoder(
        checkpoint.tokenizer,
        max_input=task.max_input or known.max_input,
        max_target=task.max_target or known.max_target,
    )
    encoded = encoder.encode(items, for_training=True)
    start, pad = int(config.decoder_start_token_id), int(config.pad_token_id or 0)
    batches = [
        _batch(encoded[at : at + batch_size], start, pad)
        for at in range(0, len(encoded), batch_size)
    ]
    digest = hashlib.sha256()
    for one in encoded:
        digest.update(repr((one.input_ids, one.target_ids)).encode())
    return batches, digest.hexdigest()


def _batch(encoded: list[Encoded], start: int, pad: int) -> Batch:
    """Inputs and targets side by side; what is added at their ends is masked."""
    inputs, mask = _padded([one.input_ids for one in encoded], pad)
    labels, target_mask = _padded([one.target_ids for one in encoded], IGNORED)
    before, _ = _padded([(start, *one.target_ids[:-1]) for one in encoded], pad)
    named = {
        "input_ids": inputs,
        "attention_mask": mask.long(),
        "decoder_input_ids": before,
        "decoder_attention_mask": target_mask.long(),
    }
    return Batch(named, mask, target_mask, labels)


def _padded(rows: list[tuple[int, ...]], value: int) -> tuple[Tensor, Tensor]:
    """The rows as one tensor, and which of its places are real."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]
