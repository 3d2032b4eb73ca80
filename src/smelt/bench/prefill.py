"""Tokens per second of reading a text at once, against its length, beside the machine's floors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from smelt.bench.cells import Progress, Settings, hold, measured_values, see, take_turns, threads
from smelt.bench.clock import Times, timed
from smelt.bench.decode import check_numbers, positions
from smelt.bench.records import PrefillRun
from smelt.bench.roofline import Roofline
from smelt.bench.state import last_logits
from smelt.bench.subjects import Subject, variants
from smelt.bench.traffic import Seen
from smelt.errors import RecipeError


@dataclass(frozen=True)
class PrefillSettings(Settings):
    """What is measured, and how often."""

    batch: int = 1
    lengths: tuple[int, ...] = (128, 512)


def check(settings: PrefillSettings) -> None:
    """Raise RecipeError for a number that cannot be, before anything is loaded."""
    check_numbers("--length", settings.lengths, 1)


def check_lengths(named: Sequence[tuple[str, PreTrainedConfig]], settings: PrefillSettings) -> None:
    """Raise RecipeError for a length beyond a model's positions, models given by name."""
    for name, config in named:
        limit = positions(config)
        if limit is not None and max(settings.lengths) > limit:
            raise RecipeError(
                f"--length {max(settings.lengths)}: {name} has {limit} positions. At most {limit}."
            )


@torch.inference_mode()
def measure(
    subjects: Sequence[Subject],
    settings: PrefillSettings,
    roofline: Roofline,
    progress: Progress | None = None,
) -> list[PrefillRun]:
    """Every subject at every length, in turns; the logits of the last token alone, as in use.

    Raises:
        RecipeError: numbers that cannot be, or a length beyond a model's positions.
    """
    check(settings)
    check_lengths([(one.name, one.model.config) for one in subjects], settings)
    every = variants(subjects, settings.skip_alpha)
    with threads(settings.threads):
        groups = [
            (f"length {n}", lambda n=n: [_Cell(one, n, settings) for one in every])
            for n in settings.lengths
        ]
        cells = take_turns(groups, settings.turns, roofline, progress)
        records = [cell.record(roofline) for cell in cells]
    for subject in subjects:
        subject.choose()
    return records


class _Cell:
    """One subject at one length."""

    def __init__(self, subject: Subject, length: int, settings: PrefillSettings) -> None:
        self.subject, self.length, self.settings = subject, length, settings
        self.times = Times()
        self.seen: Seen | None = None
        generator = torch.Generator().manual_seed(settings.seed)
        model: Any = subject.model
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (settings.batch, length), generator=generator)
        ids = ids.to(settings.device)
        self.asked: dict[str, Any] = {"input_ids": ids, "use_cache": True, **last_logits(model)}
        if model.config.is_encoder_decoder:
            start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id or 0)
            self.asked["decoder_input_ids"] = start

    def count(self) -> None:
        """See what the text reaches."""
        self.subject.choose()
        self.seen = see(self.subject, [self._run], 0.0)

    def turn(self) -> None:
        """Read the text; the first turn's was read before, by `count`."""
        self.subject.choose()
        self.times.add(timed(self._run, self.settings.device))

    def release(self) -> None:
        """There is nothing to give up but the text."""

    def _run(self) -> None:
        self.subject.model(**self.asked)

    def record(self, roofline: Roofline) -> PrefillRun:
        """What was measured, against the machine's rates."""
        subject, settings, seen, held = self.subject, self.settings, self.seen, None
        tokens = settings.batch * self.length
        if subject.cost is not None and seen is not None:
            work = subject.cost.step(tokens, 0, seen.hit, subject.kept, seen)
            other = max(0.0, seen.flops - seen.expert_flops)
            work = replace(work, expert_flops=seen.expert_flops, other_flops=other)
            held = hold(work, roofline, tokens, settings)
        return PrefillRun(
            checkpoint=subject.name,
            fingerprint=subject.fingerprint,
            batch=settings.batch,
            length=self.length,
            tokens_per_second=tokens / self.times.median,
            distinct_experts=tuple(seen.distinct) if seen is not None and seen.hit else None,
            **measured_values(self.times, held, roofline, settings),
        )
