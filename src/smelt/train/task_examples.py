"""Examples of a benchmark: what a checkpoint is fine-tuned or healed on, and what is held out."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smelt.errors import RecipeError
from smelt.text import TokenBlocks
from smelt.text.blocks import make_blocks
from smelt.text.sources import read_documents
from smelt.text.spans import IGNORED
from smelt.text2text.encode import Encoded, Encoder
from smelt.text2text.files import read_items
from smelt.text2text.invent import invent
from smelt.text2text.items import Item
from smelt.train.batches import PaddedRows, Rows
from smelt.train.data import Example
from smelt.train.measure import HeldOut
from smelt.train.settings import TaskSettings


@dataclass(frozen=True)
class TrainingSet:
    """What a run is trained on, and what is held out of it."""

    rows: Rows
    counts: Tensor  # how often each token is a label of the training set
    held_out: list[HeldOut]
    sha256: str  # of what is trained on
    distinct_tokens: int
    task: dict[str, Any] | None = None  # of a benchmark: its examples, and the share that was cut


def task_data(
    task: TaskSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> TrainingSet:
    """The examples of a benchmark for an encoder–decoder model.

    Training examples are of the training split; those held out are of the part that is for
    choosing (`smelt.text2text.files.read_items`). SMELT_DATA names the folder of files.

    Args:
        task: which benchmark, and how much of it.
        model: whose padding and first decoder token are used.
        tokenizer: its own.

    Raises:
        RecipeError: the model is no encoder–decoder, or there is no folder of files.
        SmeltError: a line of a file is no question.
    """
    if not model.config.is_encoder_decoder:
        raise RecipeError(
            f"task {task.name}: {model.config.model_type} is no encoder–decoder. Tasks are text to "
            "text here: give a checkpoint of an encoder–decoder family (switch_transformers)."
        )
    encoder = Encoder(tokenizer, max_input=task.input_length, max_target=task.target_length)
    chosen = read_items(task.name, "choose")
    train, trained_on = _train_items(task)
    drawn = _drawn(train, task)
    encoded = encoder.encode(drawn, for_training=True)
    held_out = encoder.encode(
        read_items(task.name, "choose", limit=task.held_out).items, for_training=False
    )
    examples = [as_example(one, model) for one in encoded]
    rows = PaddedRows(
        _balanced(examples, encoded) if task.balanced else examples,
        _padding(model),
        by="input_ids" if task.group_by_length else None,
    )
    counts = torch.bincount(
        torch.cat([one["labels"] for one in examples]), minlength=model.config.vocab_size
    )
    return TrainingSet(
        rows,
        counts,
        [_held_out(str(chosen), held_out, model)],
        _sha256(encoded),
        sum(len(one.input_ids) + len(one.target_ids) for one in encoded),
        {
            "name": task.name,
            "trained_on": trained_on,
            "examples": len(examples),
            "examples_with_repeats": len(rows),
            "share_of_inputs_cut": _share([one.is_cut for one in encoded]),
            "share_of_targets_cut": _share([one.is_target_cut for one in encoded]),
        },
    )


def _held_out(name: str, encoded: Sequence[Encoded], model: PreTrainedModel) -> HeldOut:
    """Examples as they are measured: all as long as the longest."""
    padding = _padding(model)
    whole = PaddedRows([as_example(one, model) for one in encoded], padding)
    together = whole.__getitems__(range(len(whole)))
    examples = [{n: v[i] for n, v in together.items()} for i in range(len(whole))]
    return HeldOut(name, examples, _blocks(encoded, padding["input_ids"]))


def as_example(encoded: Encoded, model: PreTrainedModel) -> Example:
    """An item as an encoder–decoder model takes it, as long as it is."""
    config = model.config
    source, target = torch.tensor(encoded.input_ids), torch.tensor(encoded.target_ids)
    start = torch.tensor([int(config.decoder_start_token_id)])
    return {
        "input_ids": source,
        "attention_mask": torch.ones_like(source),
        "decoder_input_ids": torch.cat([start, target[:-1]]),
        "decoder_attention_mask": torch.ones_like(target),
        "labels": target,
    }


def _padding(model: PreTrainedModel) -> dict[str, int]:
    pad = int(model.config.pad_token_id)
    return {
        "input_ids": pad,
        "attention_mask": 0,
        "decoder_input_ids": pad,
        "decoder_attention_mask": 0,
        "labels": IGNORED,
    }


def _train_items(task: TaskSettings) -> tuple[Sequence[Item], str]:
    """A benchmark's training items, or invented ones in their place; and what they are."""
    own = task.invented
    if own is None:
        train = read_items(task.name, "train")
        return train.items, str(train)
    asked = [read_items(name, "train") for name in own.paragraphs_of]
    texts = [item.context for one in asked for item in one.items]
    texts += [text for source in own.text for text in read_documents(source)]
    found = invent(texts, own.questions, seed=task.seed)
    sources = ", ".join(map(str, (*asked, *own.text)))
    if not found:
        raise RecipeError(
            f"task {task.name}: no question can be made from {sources}: there is no sentence with "
            "a number, a name or a noun in a paragraph of 200 characters. Give other text."
        )
    return found, f"{len(found):,} invented questions about {sources}"


def _drawn(train: Sequence[Item], task: TaskSettings) -> list[Item]:
    """The training items that a limit leaves, in the order of the file."""
    if task.limit is None or task.limit >= len(train):
        return list(train)
    chosen = np.random.default_rng(task.seed).permutation(len(train))[: task.limit]
    return [train[i] for i in sorted(chosen.tolist())]


def _balanced(examples: Sequence[Example], encoded: Sequence[Encoded]) -> list[Example]:
    """Every example as often, in whole times, as makes its answer about as frequent as any."""
    counts = Counter(one.item.target for one in encoded)
    most = max(counts.values())
    return [
        example
        for example, one in zip(examples, encoded, strict=True)
        for _ in range(round(most / counts[one.item.target]))
    ]


def _blocks(encoded: Sequence[Encoded], pad_id: int) -> TokenBlocks:
    rows = [torch.tensor(one.input_ids + one.target_ids) for one in encoded]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    text = sum(len(f"{one.item.question}{one.item.context}".encode()) for one in encoded)
    return make_blocks(ids, mask, text)


def _sha256(encoded: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for one in encoded:
        digest.update(repr((one.input_ids, one.target_ids)).encode())
    return digest.hexdigest()


def _share(flags: Sequence[bool]) -> float:
    return round(sum(flags) / len(flags), 4)
