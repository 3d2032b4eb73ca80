"""Weights written out: a folder that from_pretrained loads, there whole or not at all."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smelt import processes
from smelt.train import distributed


def save_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """`write` to a folder that is there whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    if processes.is_first():
        shutil.rmtree(partial, ignore_errors=True)
    write(model, tokenizer, partial, dtype)
    if processes.is_first():
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Save a copy of the model cast to `dtype`, with its tokenizer; all processes call it."""
    plain = distributed.plain(model, dtype)
    if plain is not None:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
