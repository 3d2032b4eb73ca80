"""What an analysis is made on: its settings, and micro-batches of real text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smelt.analyse.runs import Run
from smelt.errors import CalibrationError
from smelt.settings import Settings
from smelt.text import TextSource, as_source, make_blocks, parse_source, tokenize
from smelt.train.batches import Masking

FALLBACK = "python:held-out"
"""The text of a run whose recipe names none."""

Batch = dict[str, Tensor]


class AnalysisSettings(Settings):
    """Which text runs are analysed on, and how much of it."""

    text: tuple[str, ...] = ()  # (): the text that the run's own recipe holds out
    micro_batches: Annotated[int, Field(ge=2)] = 16  # M: a variance needs two
    batch_size: PositiveInt = 4  # sequences of a micro-batch
    sequence_length: Annotated[int, Field(ge=2)] | None = None  # None: the recipe's
    seed: Annotated[int, Field(ge=0)] = 0  # which text is drawn, and which tokens are masked
    device: str = "cpu"


@dataclass(frozen=True)
class Ground:
    """M micro-batches of equal size, without padding."""

    batches: tuple[Batch, ...]  # input_ids and labels [B, T], -100 where nothing is predicted
    sources: tuple[str, ...]
    sha256: str  # of the tokens

    @property
    def tokens_per_batch(self) -> int:
        return self.batches[0]["input_ids"].numel()

    def facts(self) -> dict[str, Any]:
        """How it was made, for the file of numbers."""
        rows, length = self.batches[0]["input_ids"].shape
        return {
            "text": list(self.sources),
            "text_sha256": self.sha256,
            "micro_batches": len(self.batches),
            "sequences_per_micro_batch": rows,
            "sequence_length": length,
        }


def read_ground(run: Run, settings: AnalysisSettings) -> Ground:
    """The micro-batches of a run: its own tokenizer, its objective, and text it was not trained on.

    Raises:
        CalibrationError: the text cannot be read, or is too short for so many micro-batches.
    """
    own = run.recipe.get("text") or {}
    length = settings.sequence_length or int(own.get("sequence_length", 256))
    places = getattr(run.config, "max_position_embeddings", None)
    if settings.sequence_length is None and isinstance(places, int):
        length = min(length, places)
    sources = _sources(own, settings)
    tokenizer = run.tokenizer()
    ids = _full_rows(sources, tokenizer, length, settings)
    if int(ids.max()) >= getattr(run.config, "vocab_size", 1 << 62):
        raise CalibrationError(
            f"{run.folder}: its tokenizer has ids beyond the model's vocabulary. It belongs to "
            "another model: compare tokenizer.json with the run's."
        )
    examples: Batch = {"input_ids": ids, "labels": ids}
    if run.is_masked:
        examples = _masked(run, tokenizer, ids, settings.seed)
    batches = [
        {name: value[at : at + settings.batch_size] for name, value in examples.items()}
        for at in range(0, len(ids), settings.batch_size)
    ]
    sha256 = make_blocks(ids, torch.ones_like(ids, dtype=torch.bool), 0).sha256
    return Ground(tuple(batches), tuple(map(str, sources)), sha256)


def _sources(own: Mapping[str, Any], settings: AnalysisSettings) -> list[TextSource]:
    if settings.text:
        return [parse_source(word) for word in settings.text]
    return [as_source(value) for value in own.get("held_out") or [FALLBACK]]


def _full_rows(
    sources: list[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    settings: AnalysisSettings,
) -> Tensor:
    """As many sequences as are needed [B, T], none of them padded."""
    rows = settings.micro_batches * settings.batch_size
    blocks = tokenize(
        sources,
        tokenizer,
        num_tokens=rows * length + 3 * len(sources),  # a cut inside a character moves back
        sequence_length=length,
        seed=settings.seed,
    )
    full = blocks.input_ids[blocks.mask.all(1)][:rows]
    if len(full) < rows:
        raise CalibrationError(
            f"{', '.join(map(str, sources))}: {len(full)} sequences of {length} tokens, and "
            f"{settings.micro_batches} micro-batches of {settings.batch_size} need {rows}. Give "
            "more text, or fewer or smaller micro-batches."
        )
    return full


def _masked(run: Run, tokenizer: PreTrainedTokenizerBase, ids: Tensor, seed: int) -> Batch:
    if tokenizer.mask_token_id is None:
        raise CalibrationError(
            f"{run.folder}: the model predicts masked tokens, and its tokenizer has no mask token. "
            "Put the run's own tokenizer beside its weights."
        )
    masking = Masking(tokenizer, float(run.recipe.get("masked", 0.15)))
    return masking.hide(ids, None, [(seed, row) for row in range(len(ids))])
