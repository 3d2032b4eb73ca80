"""What a SaMoE model loses, and gains, by leaving out pool entries of small |α|: no retraining."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smelt.checkpoint.inputs import Batch
from smelt.errors import CalibrationError
from smelt.evaluate.perplexity import batch_nats
from smelt.evaluate.sequences import PerSequence
from smelt.samoe.model import SaMoEForCausalLM


@dataclass(frozen=True)
class Skipped:
    """A model at one threshold."""

    threshold: float  # entries with every |α| below it are left out; 0: none
    kept: tuple[tuple[int, ...], ...]  # the entries that are run, by MoE layer
    nats: float  # per predicted token
    standard_error: float | None  # over sequences
    nats_more: float  # than with every entry
    nats_more_error: float | None  # paired, over sequences
    num_tokens: int
    ms: float  # of one batch, its loss included, on average


@torch.inference_mode()
def skip_quality(
    model: SaMoEForCausalLM, batches: Sequence[Batch], thresholds: Sequence[float]
) -> list[Skipped]:
    """The model's loss on the batches at every threshold, and at 0 before them.

    Args:
        batches: with targets (`smelt.checkpoint.inputs.make_batches`).

    Raises:
        CalibrationError: batches without targets.
        RecipeError: a threshold that leaves a layer without entries; before anything is measured.
    """
    if not batches or any(batch.labels is None for batch in batches):
        raise CalibrationError("The batches have no targets: make them with make_batches.")
    try:
        for threshold in thresholds:
            model.skip_entries(threshold)
        whole: PerSequence | None = None
        found = []
        for threshold in (0.0, *thresholds):
            kept = tuple(model.skip_entries(threshold))
            nats, seconds = _measure(model, batches)
            whole = whole or nats
            more = nats.minus(whole)
            found.append(
                Skipped(
                    threshold=threshold,
                    kept=kept,
                    nats=nats.mean,
                    standard_error=nats.standard_error,
                    nats_more=more.mean,
                    nats_more_error=more.standard_error,
                    num_tokens=nats.num_tokens,
                    ms=1e3 * seconds / len(batches),
                )
            )
        return found
    finally:
        model.skip_entries(0.0)


def _measure(model: SaMoEForCausalLM, batches: Sequence[Batch]) -> tuple[PerSequence, float]:
    """The loss by sequence, and the seconds of the forwards."""
    parts, seconds = [], 0.0
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
        begin = time.perf_counter()
        logits = model(**inputs, use_cache=False).logits
        assert batch.labels is not None and logits is not None
        parts.append(batch_nats(logits, batch.labels))
        seconds += time.perf_counter() - begin
    return PerSequence.join(parts), seconds
