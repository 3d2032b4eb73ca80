"""Teachers: what an original predicts, from a model beside the student or from the disk."""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smelt.train.batches import Rows
from smelt.train.data import Example
from smelt.train.distill import Top
from smelt.train.heal_cache import Kept

NUMBERS = "example_numbers"
"""Beside a batch's tensors: the number of each of its examples in the set they are drawn from."""


class NumberedRows:
    """A training set whose batches say which examples they hold."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.lengths = rows, rows.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: Any) -> Example:
        own = torch.tensor([number % len(self.rows) for number in numbers])
        return {**self.rows.__getitems__(numbers), NUMBERS: own}


class Teacher(Protocol):
    """What a teacher says of a batch."""

    def of(self, batch: Example) -> Tensor | Top:
        """Its logits [N, V] of all places; or what is kept of those with a target, in order."""
        ...


class LiveTeacher:
    """A model in memory, which learns nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def of(self, batch: Example) -> Tensor:
        """The logits of all places."""
        inputs = {n: value for n, value in batch.items() if n not in ("labels", NUMBERS)}
        if "attention_mask" in inputs and bool(inputs["attention_mask"].all()):
            del inputs["attention_mask"]  # as for the student
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits.flatten(0, 1)


class CachedTeacher:
    """Predictions kept on disk: no weight of the teacher is in memory."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def of(self, batch: Example) -> Top:
        """What is kept of the batch's places with a target."""
        numbers = batch[NUMBERS]
        return self.kept.take(numbers.tolist(), numbers.device)
