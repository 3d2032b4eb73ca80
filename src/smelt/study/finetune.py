"""Fine-tuning an encoder on classification: a fixed number of epochs, then one measurement."""

import gzip
import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from smelt.errors import RecipeError
from smelt.samoe.model import SaMoEForSequenceClassification
from smelt.study.settings import Finetune
from smelt.text2text.files import data_folder


@dataclass(frozen=True)
class ClassTask:
    """A file of labelled texts: the fields that are read, and which split is reported."""

    fields: tuple[str, ...]  # one text, or a pair
    labels: tuple[Any, ...]  # as the file spells classes 0, 1; F1 is of class 1
    split: str


TASKS = {
    "sst2": ClassTask(("sentence",), (0, 1), "test"),
    "mrpc": ClassTask(("sentence1", "sentence2"), (0, 1), "test"),
    "rte": ClassTask(("premise", "hypothesis"), ("entailment", "not_entailment"), "validation"),
}
"""By the name of their folder. RTE has no labelled test split here."""


@dataclass(frozen=True)
class Items:
    """Tokens and classes of the items of a split."""

    ids: list[list[int]]
    labels: list[int]
    num_cut: int  # items that did not fit the positions
    sha256: str  # of the file


def finetune(
    folder: str | Path,
    name: str,
    settings: Finetune,
    *,
    seed: int,
    data: str | Path | None = None,
) -> dict[str, Any]:
    """Train a classifier from a pre-trained checkpoint and measure it once, at the end.

    Nothing is chosen by the split that is reported: number of epochs and learning rate are given.
    Training is dropless, as the padding of short sequences would use up the experts' capacity.

    Args:
        folder: a checkpoint of SaMoEForMaskedLM or SaMoEForCausalLM, with its tokenizer.
        name: of `TASKS`.
        settings: epochs, batch, learning rate, training items at most.
        seed: of the new head and the order of the items.
        data: the folder of task files; None: the one that SMELT_DATA names.

    Returns:
        accuracy with its standard error, F1 of class 1, n, the accuracy of guessing (`chance`) and
        of always saying the commonest class (`majority`), the last training loss, and the settings.
    """
    if name not in TASKS:
        raise RecipeError(f"finetune: there is no task {name!r}. The tasks: {', '.join(TASKS)}.")
    task = TASKS[name]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.num_labels, config.capacity_factor = len(task.labels), None
    longest = config.max_position_embeddings
    train = read_items(name, "train", tokenizer, longest, data, settings.limit)
    test = read_items(name, task.split, tokenizer, longest, data)
    set_seed(seed)
    model = SaMoEForSequenceClassification.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True
    )
    collate = _Collate(int(tokenizer.pad_token_id))
    steps = settings.epochs * len(train.labels) / settings.batch_size
    warmup = round(0.1 * steps)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            _arguments(scratch, settings, seed, warmup),
            data_collator=collate,
            train_dataset=_rows(train),
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    guesses = _predict(model, test, collate, settings.batch_size)
    return {
        **score(guesses, test.labels),
        "f1_of": task.labels[1],
        "split": task.split,
        "training_items": len(train.labels),
        "num_cut": test.num_cut,
        "training_loss": loss,
        "seed": seed,
        "settings": settings.model_dump(mode="json", exclude={"tasks", "seeds"}),
        "train_sha256": train.sha256,
        "test_sha256": test.sha256,
    }


def score(guesses: Sequence[int], labels: Sequence[int]) -> dict[str, Any]:
    """Accuracy, its standard error, and F1 of class 1, beside what guessing gives."""
    n = len(labels)
    right = sum(guess == label for guess, label in zip(guesses, labels, strict=True))
    accuracy = right / n
    both = sum(guess == label == 1 for guess, label in zip(guesses, labels, strict=True))
    said, there = sum(guess == 1 for guess in guesses), sum(label == 1 for label in labels)
    classes = Counter(labels)
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None,
        "f1": 2 * both / (said + there) if said + there else 0.0,
        "n": n,
        "chance": 1 / len(classes),
        "majority": max(classes.values()) / n,
    }


def read_items(
    name: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    data: str | Path | None = None,
    limit: int | None = None,
) -> Items:
    """A split as tokens: the texts of a pair with the end-of-text token between them.

    What is too long loses its end; of a pair, the longer text does.

    Args:
        limit: the first so many items; None: all.
    """
    path = data_folder(data) / name / f"{split}.jsonl.gz"
    try:
        text = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error}). It belongs to {name}.") from None
    task, ids, labels, num_cut = TASKS[name], [], [], 0
    for line in text.decode("utf-8").splitlines()[:limit]:
        row: Mapping[str, Any] = json.loads(line)
        parts = [tokenizer.encode(row[field], add_special_tokens=False) for field in task.fields]
        num_cut += _cut(parts, longest - len(parts) + 1)
        joined = list(parts[0])
        for more in parts[1:]:
            joined += [int(tokenizer.eos_token_id), *more]
        ids.append(joined or [int(tokenizer.eos_token_id)])
        labels.append(task.labels.index(row["label"]))
    return Items(ids, labels, num_cut, hashlib.sha256(text).hexdigest())


def _cut(parts: list[list[int]], room: int) -> bool:
    """Shorten the longer part, token by token, until all fit; whether that was needed."""
    was_cut = False
    while sum(map(len, parts)) > room:
        max(parts, key=len).pop()
        was_cut = True
    return was_cut


@dataclass(frozen=True)
class _Collate:
    """Sequences padded on the right to the longest of the batch."""

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for at, row in enumerate(rows):
            count = len(row["input_ids"])
            ids[at, :count] = torch.tensor(row["input_ids"])
            mask[at, :count] = 1
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _rows(items: Items) -> list[dict[str, Any]]:
    return [
        {"input_ids": ids, "labels": label}
        for ids, label in zip(items.ids, items.labels, strict=True)
    ]


@torch.no_grad()
def _predict(
    model: SaMoEForSequenceClassification, items: Items, collate: _Collate, batch_size: int
) -> list[int]:
    model.train(False)
    device = next(model.parameters()).device
    guesses: list[int] = []
    rows = _rows(items)
    for at in range(0, len(rows), batch_size):
        batch = collate(rows[at : at + batch_size])
        found = model(**{key: value.to(device) for key, value in batch.items()})
        assert found.logits is not None
        guesses += found.logits.argmax(-1).tolist()
    return guesses


def _arguments(scratch: str, settings: Finetune, seed: int, warmup: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=warmup,
        weight_decay=0.01,
        seed=seed,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
