"""Sums over the tokens of each sequence: the units in which an error of measurement is counted.

Tokens of one sequence depend on each other, so n is the number of sequences, not of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smelt.checkpoint.inputs import Batch
from smelt.errors import CalibrationError

_CHUNK = 1 << 22
"""Numbers of one float32 chunk of logits: 16 MiB."""


@dataclass(frozen=True)
class PerSequence:
    """A quantity of tokens, summed over each of B sequences."""

    total: Float[Tensor, " B"]  # float64
    count: Int[Tensor, " B"]  # tokens; 0: the sequence says nothing

    @property
    def num_sequences(self) -> int:
        """Sequences that have a token."""
        return int((self.count > 0).sum())

    @property
    def num_tokens(self) -> int:
        return int(self.count.sum())

    @property
    def mean(self) -> float:
        """Per token, over all sequences."""
        return float(self.total.sum() / self.count.sum())

    @property
    def standard_error(self) -> float | None:
        """Of the mean, with sequences as the units; None: one sequence says nothing of it.

        That of a ratio of two sums; where all sequences are as long, sd / √n of their means.
        """
        n = self.num_sequences
        if n < 2:
            return None
        residual = self.total - self.mean * self.count
        return float((residual.square().sum() * n / (n - 1)).sqrt() / self.count.sum())

    def minus(self, other: "PerSequence") -> "PerSequence":
        """The difference, sequence by sequence, of two measurements of the same tokens."""
        if not torch.equal(self.count, other.count):
            raise CalibrationError(
                "The two measurements are of other tokens, so their sequences have no pairs. "
                "Measure both on the same text with the same tokenizer."
            )
        return PerSequence(self.total - other.total, self.count)

    @classmethod
    def join(cls, parts: Sequence["PerSequence"]) -> "PerSequence":
        """The sequences of all parts, in turn."""
        return cls(torch.cat([p.total for p in parts]), torch.cat([p.count for p in parts]))


def is_measured(batch: Batch) -> Tensor:
    """The places [B, T] that count: those with a target, or all real ones where none are given."""
    if batch.labels is not None:
        return batch.labels >= 0
    return batch.mask if batch.decoder_mask is None else batch.decoder_mask


def per_sequence(
    where: Tensor, num_columns: int, num_values: int, measure: Callable[[Tensor], Tensor]
) -> list[PerSequence]:
    """What `measure` says of each place of a batch, summed over each sequence.

    Args:
        where: the places [B, T] that count.
        num_columns: numbers per place that `measure` makes float32 copies of (the vocabulary).
        num_values: Q, the quantities that it returns.
        measure: given n flat places (row · T + column), Q quantities of each, [n, Q]. Called on a
            few places at a time, so that no float32 copy of all logits exists.
    """
    places = where.flatten().nonzero()[:, 0]
    size = max(1, _CHUNK // num_columns)
    totals = torch.zeros(len(where), num_values, dtype=torch.float64)
    for chunk in places.split(size):
        if len(chunk):
            rows = (chunk // where.shape[1]).cpu()
            totals.index_add_(0, rows, measure(chunk).cpu().double())
    count = where.sum(1).cpu()
    return [PerSequence(total, count) for total in totals.unbind(1)]
