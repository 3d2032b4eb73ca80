"""Milliseconds per cached decode step, against batch and context, beside the machine's floors.

In a turn each model makes a step that is not timed, then some that are, on other tokens every time:
experts that stay in the cache between steps of one model are found there, and those that do not are
not. The context of an encoder–decoder is what its encoder reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from smelt.bench.cells import (
    Progress,
    Settings,
    hold,
    measured_values,
    see,
    take_turns,
    threads,
)
from smelt.bench.clock import Times, timed
from smelt.bench.records import Decoded, DecodeStep, machine
from smelt.bench.roofline import Roofline
from smelt.bench.state import CONTEXTS, State
from smelt.bench.subjects import Subject, variants
from smelt.bench.traffic import Seen
from smelt.errors import RecipeError


@dataclass(frozen=True)
class DecodeSettings(Settings):
    """What is measured, and how often."""

    batches: tuple[int, ...] = (1, 8, 64, 256)
    contexts: tuple[int, ...] = (0, 512)
    steps: int = 3  # timed, in a turn


def check(settings: DecodeSettings) -> None:
    """Raise RecipeError for a number that cannot be, before anything is loaded."""
    for name, values, least in (
        ("--batch", settings.batches, 1),
        ("--context", settings.contexts, 0),
        ("--repeats", (settings.turns,), 1),
        ("--threads", (settings.threads,), 1),
    ):
        check_numbers(name, values, least)


def check_numbers(name: str, values: Sequence[int], least: int) -> None:
    """Raise RecipeError for a number below the least."""
    wrong = [str(value) for value in values if value < least]
    if wrong or not values:
        raise RecipeError(f"{name} {', '.join(wrong) or '(none)'}: it is at least {least}.")


def check_contexts(named: Sequence[tuple[str, PreTrainedConfig]], settings: DecodeSettings) -> None:
    """Raise RecipeError for a context beyond a model's positions, models given by name."""
    for name, config in named:
        limit = positions(config)
        if limit is not None and max(settings.contexts) >= limit:
            raise RecipeError(
                f"--context {max(settings.contexts)}: {name} has {limit} positions, and the step "
                f"takes one. At most {limit - 1}."
            )
        if config.is_encoder_decoder and min(settings.contexts) == 0:
            raise RecipeError(
                f"--context 0: {name} is an encoder–decoder, and its context is what the encoder "
                "reads. At least 1."
            )


def positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has; None: as many as one likes."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


@torch.inference_mode()
def measure(
    subjects: Sequence[Subject],
    settings: DecodeSettings,
    progress: Progress | None = None,
    roofline: Roofline | None = None,
) -> Decoded:
    """Every subject at every batch and context, in turns.

    Args:
        roofline: measures this machine, for other figures too; None: for these alone.

    Raises:
        RecipeError: numbers that cannot be, a context beyond a model's positions, or a threshold
            that no model has entries for or that empties a layer.
    """
    check(settings)
    check_contexts([(one.name, one.model.config) for one in subjects], settings)
    every = variants(subjects, settings.skip_alpha)
    with threads(settings.threads):
        if roofline is None:
            roofline = Roofline(settings.dtype, settings.device, settings.batches)
        grid = [(b, c) for b in settings.batches for c in settings.contexts]
        groups = [
            (
                f"batch {b}, context {c}",
                lambda b=b, c=c: [_Cell(one, b, c, settings) for one in every],
            )
            for b, c in grid
        ]
        cells = take_turns(groups, settings.turns, roofline, progress)
        records = [cell.record(roofline) for cell in cells]
    for subject in subjects:
        subject.choose()
    return Decoded(records, roofline.wall, roofline.processor, machine(settings.threads))


class _Cell:
    """One subject at one batch and context."""

    state: State | None

    def __init__(
        self, subject: Subject, batch: int, context: int, settings: DecodeSettings
    ) -> None:
        self.subject, self.batch, self.context = subject, batch, context
        self.settings, self.times = settings, Times()
        self.seen: Seen | None = None
        generator = torch.Generator().manual_seed(settings.seed)
        vocabulary = subject.model.config.get_text_config().vocab_size

        def draw(*shape: int) -> Tensor:
            ids = torch.randint(vocabulary, shape, generator=generator)
            return ids.to(settings.device)

        self.tokens = draw(settings.steps + 1, batch, 1)
        subject.choose()
        self.state = State(subject.model, draw(min(batch, CONTEXTS), context), batch)
        self.cached_values = self.state.cached_values

    def count(self) -> None:
        """Make all steps once, and see what the timed ones reach."""
        self.subject.choose()
        self._step(self.tokens[0])
        jobs = [partial(self._step, tokens) for tokens in self.tokens[1:]]
        self.seen = see(self.subject, jobs, self.cached_values)

    def turn(self) -> None:
        """A step that is not timed, then those that are."""
        assert self.state is not None
        self.subject.choose()
        self._step(self.tokens[0])
        taken = Times()
        for tokens in self.tokens[1:]:
            taken.add(timed(partial(self.state.step, tokens), self.settings.device))
            self.state.back()
        steps = self.settings.steps
        self.times.add(Times([sum(taken.wall) / steps], [sum(taken.processor) / steps]))

    def release(self) -> None:
        """The cache goes."""
        self.state = None

    def _step(self, tokens: Tensor) -> None:
        assert self.state is not None
        self.state.step(tokens)
        self.state.back()

    def record(self, roofline: Roofline) -> DecodeStep:
        """What was measured, against the machine's rates."""
        subject, settings, seen, held = self.subject, self.settings, self.seen, None
        predicted = None
        if subject.cost is not None and seen is not None:
            cost, at = subject.cost, (self.batch, self.context)
            held = hold(
                cost.step(*at, seen.hit, subject.kept, seen), roofline, self.batch, settings
            )
            uniform = cost.step(*at, None, subject.kept, seen)
            predicted = uniform.values * settings.dtype.itemsize
        return DecodeStep(
            checkpoint=subject.name,
            fingerprint=subject.fingerprint,
            skip_alpha=subject.threshold,
            kept_entries=subject.kept,
            batch=self.batch,
            context=self.context,
            steps=settings.steps,
            bytes_predicted=predicted,
            distinct_experts=tuple(seen.distinct) if seen is not None and seen.hit else None,
            **measured_values(self.times, held, roofline, settings),
        )
