"""Checkpoints side by side on the same tokens: each one's loss, and its difference to the first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smelt.checkpoint.inputs import make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import Progress
from smelt.errors import CalibrationError
from smelt.evaluate.perplexity import Perplexity, measure
from smelt.evaluate.sequences import PerSequence
from smelt.text import TokenBlocks


@dataclass(frozen=True)
class Compared:
    """One checkpoint beside the first of a comparison."""

    name: str
    perplexity: Perplexity
    difference: PerSequence | None  # nats more than the first; None: it is the first, or no pairs

    def row(self) -> dict[str, str | float | None]:
        """The comparison as a row of a table."""
        more = self.difference
        return {
            "checkpoint": self.name,
            "nats per token": self.perplexity.nats,
            "± se": self.perplexity.standard_error,
            "perplexity": self.perplexity.perplexity,
            "bits per byte": self.perplexity.bits_per_byte,
            "nats more than the first": None if more is None else more.mean,
            "± se, paired": None if more is None else more.standard_error,
            "tokens": self.perplexity.num_tokens,
        }


def compare(
    checkpoints: Sequence[Checkpoint],
    text: Callable[[Checkpoint], TokenBlocks],
    *,
    batch_size: int = 8,
    seed: int = 0,
    bits_per_byte_only: bool = False,
    device: str = "cpu",
    stages: Callable[[str], Progress] | None = None,
) -> list[Compared]:
    """Several checkpoints side by side on the same tokens, each with its difference to the first.

    Args:
        text: the text in a checkpoint's tokens, such as `partial(read_text, recipe=recipe)`.
        bits_per_byte_only: allow other tokenizers, whose nats and perplexities do not compare and
            whose sequences have no pairs.

    Raises:
        CalibrationError: the tokenizers differ; found before any model runs.
    """
    blocks = [text(checkpoint) for checkpoint in checkpoints]
    odd = [c for c, b in zip(checkpoints, blocks, strict=True) if b.sha256 != blocks[0].sha256]
    if odd and not bits_per_byte_only:
        raise CalibrationError(
            f"{odd[0].folder.name} and {checkpoints[0].folder.name} cut the text into different "
            "tokens, so nats per token and perplexity do not compare. Compare bits per byte only, "
            "or checkpoints of one tokenizer."
        )
    compared: list[Compared] = []
    for checkpoint, own in zip(checkpoints, blocks, strict=True):
        name = checkpoint.folder.name
        batches = make_batches(checkpoint, own, batch_size, seed)
        progress = stages(name) if stages else None
        found = measure(checkpoint, batches, own.num_bytes, device=device, progress=progress)
        has_pairs = bool(compared) and own.sha256 == blocks[0].sha256
        first = compared[0].perplexity.sequences if has_pairs else None
        more = None if first is None else found.sequences.minus(first)
        compared.append(Compared(name, found, more))
    return compared
