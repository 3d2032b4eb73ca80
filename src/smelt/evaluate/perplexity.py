"""How well a checkpoint predicts a text: nats per token, perplexity, bits per byte."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Walk
from smelt.compress.calibrate import Progress
from smelt.errors import CalibrationError, CheckpointError
from smelt.evaluate.results import Measured, Result, Setting, record
from smelt.evaluate.sequences import PerSequence, is_measured, per_sequence
from smelt.evaluate.walks import Steps


@dataclass(frozen=True)
class Perplexity:
    """The loss of a checkpoint on a text, by sequence, so that two can be compared in pairs."""

    sequences: PerSequence  # nats
    num_bytes: float | None  # of the predicted tokens' text; None: encoder–decoder

    @property
    def nats(self) -> float:
        """Mean loss per predicted token."""
        return self.sequences.mean

    @property
    def standard_error(self) -> float | None:
        """Of `nats`, over sequences."""
        return self.sequences.standard_error

    @property
    def num_tokens(self) -> int:
        """The tokens that were predicted: the first of a sequence is not."""
        return self.sequences.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers. None for an encoder–decoder: it fills gaps in a text."""
        if self.num_bytes is None:
            return None
        return self.nats * self.num_tokens / self.num_bytes / math.log(2)

    def records(self, checkpoint: Measured, setting: Setting) -> list[Result]:
        """The measurement as named records; all errors are that of the nats, scaled."""
        error = self.standard_error
        scaled = {"nats per token": (self.nats, 1.0), "perplexity": (self.perplexity,) * 2}
        if self.bits_per_byte is not None:
            scaled["bits per byte"] = (self.bits_per_byte, self.bits_per_byte / (self.nats or 1.0))
        return [
            record(
                checkpoint,
                setting,
                task="perplexity",
                metric=metric,
                value=value,
                n=self.num_tokens,
                standard_error=None if error is None else error * scale,
                by_sequence=None if metric == "perplexity" else self._shares(value),
            )
            for metric, (value, scale) in scaled.items()
        ]

    def _shares(self, value: float) -> tuple[float, ...] | None:
        """What each sequence adds to a value that is in proportion to the nats."""
        total = self.sequences.total
        if not math.isfinite(value) or not self.nats:
            return None
        return tuple(float(f"{one:.9g}") for one in (total / total.sum() * value).tolist())


def measure(
    checkpoint: Checkpoint,
    batches: Sequence[Batch],
    num_bytes: int,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Perplexity:
    """The model's own loss on the batches, one block's weights in memory at a time.

    Args:
        batches: with targets (`checkpoint.inputs.make_batches`).
        num_bytes: UTF-8 bytes of the text of all real tokens (`TokenBlocks.num_bytes`). A causal
            model does not predict the first token of a sequence, so the share of bytes that is
            counted is the share of real tokens that is predicted (exact to the length of those
            first tokens).

    Raises:
        CalibrationError: batches without targets.
        CheckpointError: token ids beyond the vocabulary, or outputs that are not finite.
    """
    _check(checkpoint, batches)
    steps = Steps(progress, len(checkpoint.blocks) - 1)
    walk = Walk(checkpoint, [b.inputs for b in batches], device=device)
    parts: dict[int, PerSequence] = {}
    with closing(walk.run(steps.visit)) as outputs:  # type: ignore[type-var]
        for index, output in outputs:
            labels = batches[index].labels
            assert labels is not None
            parts[index] = batch_nats(output.logits, labels)
    sequences = PerSequence.join([parts[i] for i in range(len(batches))])
    check_finite(checkpoint, sequences)
    if checkpoint.config.is_encoder_decoder:
        return Perplexity(sequences, None)
    real = sum(int(batch.mask.sum()) for batch in batches)
    return Perplexity(sequences, num_bytes * sequences.num_tokens / real)


def batch_nats(logits: Tensor, labels: Tensor) -> PerSequence:
    """The loss [B] of logits [B, T, V] at their targets [B, T], float32 a few tokens at a time."""
    labels = labels.to(logits.device)
    flat, target = logits.flatten(0, 1), labels.flatten()

    def nats(places: Tensor) -> Tensor:
        return cross_entropy(flat[places].float(), target[places], reduction="none")[:, None]

    return per_sequence(labels >= 0, flat.shape[-1], 1, nats)[0]


def check_finite(checkpoint: Checkpoint, sequences: PerSequence) -> None:
    """Raise CheckpointError if a sum is NaN or Inf."""
    if not bool(torch.isfinite(sequences.total).all()):
        raise CheckpointError(
            f"{checkpoint.folder}: the model's outputs are NaN or Inf. Its weights are damaged, or "
            f"its numbers do not fit {str(checkpoint.dtype).removeprefix('torch.')}."
        )


def _check(checkpoint: Checkpoint, batches: Sequence[Batch]) -> None:
    if any(batch.labels is None for batch in batches):
        raise CalibrationError("The batches have no targets: make them with make_batches.")
    if not any(bool(is_measured(batch).any()) for batch in batches):
        raise CalibrationError(
            "No token of this text is predicted: a sequence needs at least two tokens."
        )
    vocabulary = checkpoint.config.get_text_config().vocab_size
    largest = max(int(batch.inputs["input_ids"].max()) for batch in batches)
    if largest >= vocabulary:
        raise CheckpointError(
            f"{checkpoint.folder}: the text has token id {largest}, the model has {vocabulary} "
            "tokens. Tokenizer and weights are of different models."
        )
