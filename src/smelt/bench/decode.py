"""Milliseconds per cached decode step, against batch and context, beside the machine's floors.

All models take turns, so that what else the machine does falls on all alike. In a turn each model
makes a step that is not timed, then some that are, on other tokens every time: experts that stay in
the cache between steps of one model are found there, and those that do not are not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from smelt.bench.clock import Times, timed
from smelt.bench.records import Decoded, DecodeStep, machine
from smelt.bench.roofline import Rates, Roofline, last_cache_bytes
from smelt.bench.subjects import Subject, variants
from smelt.bench.traffic import Work
from smelt.errors import RecipeError
from smelt.samoe.model import SaMoEForCausalLM
from smelt.samoe.moe import Router

Progress = Callable[[str, int, int], None]

_CONTEXTS = 8
"""Different contexts in a batch; further rows repeat them, each with a next token of its own."""


@dataclass(frozen=True)
class DecodeSettings:
    """What is measured, and how often."""

    batches: tuple[int, ...] = (1, 8, 64, 256)
    contexts: tuple[int, ...] = (0, 512)
    turns: int = 5
    steps: int = 3  # timed, in a turn
    skip_alpha: tuple[float, ...] = ()  # each SaMoE model is measured at these thresholds too
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    seed: int = 0


def check(settings: DecodeSettings) -> None:
    """Raise RecipeError for a number that cannot be, before anything is loaded."""
    for name, values, least in (
        ("--batch", settings.batches, 1),
        ("--context", settings.contexts, 0),
        ("--repeats", (settings.turns,), 1),
        ("--threads", (settings.threads,), 1),
    ):
        wrong = [str(value) for value in values if value < least]
        if wrong or not values:
            raise RecipeError(f"{name} {', '.join(wrong) or '(none)'}: it is at least {least}.")


def _check_contexts(subjects: Sequence[Subject], settings: DecodeSettings) -> None:
    for subject in subjects:
        limit = getattr(subject.model.config, "max_position_embeddings", None)
        if limit is not None and max(settings.contexts) >= limit:
            raise RecipeError(
                f"--context {max(settings.contexts)}: {subject.name} has {limit} positions, and "
                f"the step takes one. At most {limit - 1}."
            )


@torch.inference_mode()
def measure(
    subjects: Sequence[Subject], settings: DecodeSettings, progress: Progress | None = None
) -> Decoded:
    """Every subject at every batch and context, in turns.

    Raises:
        RecipeError: numbers that cannot be, a context beyond a model's positions, or a threshold
            that no model has entries for or that empties a layer.
    """
    check(settings)
    _check_contexts(subjects, settings)
    subjects = variants(subjects, settings.skip_alpha)
    cells = [(b, c) for b in settings.batches for c in settings.contexts]
    total, done = len(cells) * settings.turns, 0
    with _threads(settings.threads):
        roofline = Roofline(settings.dtype, settings.device, settings.batches)
        measured = []
        for batch, context in cells:
            cell = [_Cell(subject, batch, context, settings) for subject in subjects]
            for turn in range(settings.turns):
                if turn == 0:
                    for one in cell:
                        one.count()
                roofline.turn()
                for one in cell:
                    one.turn()
                done += 1
                if progress is not None:
                    progress(f"batch {batch}, context {context}", done, total)
            for one in cell:
                one.cache = None
            measured += cell
        records = [one.record(roofline) for one in measured]
    for subject in subjects:
        _skip(subject.model, 0.0)
    return Decoded(records, roofline.wall, roofline.processor, machine(settings.threads))


class _Cell:
    """One subject at one batch and context."""

    cache: DynamicCache | None

    def __init__(
        self, subject: Subject, batch: int, context: int, settings: DecodeSettings
    ) -> None:
        self.subject, self.batch, self.context = subject, batch, context
        self.settings, self.times = settings, Times()
        self.hit: list[float] | None = None
        generator = torch.Generator().manual_seed(settings.seed)
        vocabulary = subject.model.config.get_text_config().vocab_size

        def draw(*shape: int) -> Tensor:
            ids = torch.randint(vocabulary, shape, generator=generator)
            return ids.to(settings.device)

        self.tokens = draw(settings.steps + 1, batch, 1)
        self._choose()
        self.cache = _filled(subject.model, draw(min(batch, _CONTEXTS), context), batch)

    def count(self) -> None:
        """Make all steps once, and see which experts the timed ones reach."""
        model = self.subject.model
        if not isinstance(model, SaMoEForCausalLM):
            return
        self._choose()
        self._step(self.tokens[0])
        num_layers, K = len(model.config.layout.layers), model.config.num_experts_per_tok
        sums = [0.0] * num_layers
        for tokens in self.tokens[1:]:
            with _routed(model) as logits:
                self._step(tokens)
            for layer, values in enumerate(logits):
                sums[layer] += len(values.topk(K).indices.unique())
        self.hit = [value / self.settings.steps for value in sums]

    def turn(self) -> None:
        """A step that is not timed, then those that are."""
        self._choose()
        self._step(self.tokens[0])
        taken = Times()
        for tokens in self.tokens[1:]:
            taken.add(timed(lambda ids=tokens: self._forward(ids), self.settings.device))  # type: ignore[misc]
            self._back()
        steps = self.settings.steps
        self.times.add(Times([sum(taken.wall) / steps], [sum(taken.processor) / steps]))

    def _choose(self) -> None:
        """Let the model run the entries of this subject: several subjects can share a model."""
        _skip(self.subject.model, self.subject.threshold or 0.0)

    def _step(self, tokens: Tensor) -> None:
        self._forward(tokens)
        self._back()

    def _forward(self, tokens: Tensor) -> None:
        self.subject.model(tokens, past_key_values=self.cache, use_cache=True)

    def _back(self) -> None:
        assert self.cache is not None
        self.cache.crop(-1)

    def record(self, roofline: Roofline) -> DecodeStep:
        """What was measured, against the machine's rates."""
        subject, settings, times = self.subject, self.settings, self.times
        values: dict[str, Any] = {}
        if subject.cost is not None:
            uniform = subject.cost.step(self.batch, self.context, None, subject.kept)
            seen = subject.cost.step(self.batch, self.context, self.hit, subject.kept)
            values = self._floors(seen, roofline.wall)
            if settings.device.type == "cpu":
                floor = self._floors(seen, roofline.processor)["floor_ms"]
                values["processor_ratio"] = times.least_processor * 1e3 / floor
            values["bytes_predicted"] = uniform.values * settings.dtype.itemsize
            values["gigabytes_per_second"] = values["bytes_read"] / times.least / 1e9
            values["ratio"] = times.least * 1e3 / values["floor_ms"]
        return DecodeStep(
            checkpoint=subject.name,
            skip_alpha=subject.threshold,
            kept_entries=subject.kept,
            batch=self.batch,
            context=self.context,
            dtype=str(settings.dtype).removeprefix("torch."),
            device=str(settings.device),
            threads=settings.threads,
            turns=settings.turns,
            steps=settings.steps,
            ms=times.least * 1e3,
            ms_median=times.median * 1e3,
            processor_ms=times.least_processor * 1e3,
            distinct_experts=None if self.hit is None else tuple(self.hit),
            **values,
        )

    def _floors(self, work: Work, rates: Rates) -> dict[str, Any]:
        """What the machine needs at least for a step: milliseconds."""
        size, device = self.settings.dtype.itemsize, self.settings.device
        fits = work.resident_values * size <= last_cache_bytes(device) / 2
        bandwidth = rates.cache if fits and rates.cache else rates.memory
        per_byte, per_flop = 1e3 / bandwidth, 1e3 / rates.flops[self.batch]
        by_bytes, by_flops = work.values * size * per_byte, work.flops * per_flop
        experts = max(work.expert_values * size * per_byte, work.expert_flops * per_flop)
        other = max(work.other_values * size * per_byte, work.other_flops * per_flop)
        return {
            "bytes_read": work.values * size,
            "flops": work.flops,
            "byte_floor_ms": by_bytes,
            "flop_floor_ms": by_flops,
            "floor_ms": max(by_bytes, by_flops),
            "floor_by_part_ms": experts + other,
            "reads_from": "cache" if bandwidth == rates.cache else "memory",
        }


def _skip(model: PreTrainedModel, threshold: float) -> None:
    if isinstance(model, SaMoEForCausalLM):
        model.skip_entries(threshold)


def _filled(model: PreTrainedModel, ids: Tensor, batch: int) -> DynamicCache:
    """The cache after `ids` [R, context], its rows repeated to a batch."""
    cache = DynamicCache(config=model.config)
    if ids.shape[1] == 0:
        return cache
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if batch > len(ids):
        cache.batch_select_indices(torch.arange(batch, device=ids.device) % len(ids))
    return cache


@contextmanager
def _routed(model: SaMoEForCausalLM) -> Iterator[list[Tensor]]:
    """Within: the router logits of every MoE layer, in order of the layers."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
