"""The recipe of a comparison: one start, grounds to stand on, variants of compression, parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from smelt.settings import Settings
from smelt.study.settings import Name, Overrides, nested, put
from smelt.text2text.tasks import TASKS

FULL = "full"
"""The variant that every comparison has: the fine-tuned model, neither compressed nor healed."""

Seed = Annotated[int, Field(ge=0)]


class GroundText(Settings):
    """Text to stand on, for causal models; sources as words."""

    train: Annotated[tuple[str, ...], Field(min_length=1)]  # calibrated and healed on
    choose: Annotated[tuple[str, ...], Field(min_length=1)]  # learning rates are chosen on it
    report: Annotated[tuple[str, ...], Field(min_length=1)]  # the figures of the tables
    tokens: PositiveInt = 1 << 20  # to heal on
    report_tokens: PositiveInt = 65_536  # of each source
    sequence_length: PositiveInt = 256
    tasks: tuple[str, ...] = ()  # zero-shot, beside perplexity

    @model_validator(mode="after")
    def _reported_on_nothing_else(self) -> "GroundText":
        shared = sorted(set(self.report) & {*self.train, *self.choose})
        if shared:
            raise ValueError(f"{shared[0]} is reported, so nothing is trained or chosen on it")
        return self


class Ground(Settings):
    """What the cells of one name are fine-tuned, calibrated, healed and measured on.

    A benchmark, by its own name or another, or a text.
    """

    benchmark: str | None = None  # None: the name of the ground
    text: GroundText | None = None  # causal models
    limit: PositiveInt | None = None  # training examples; None: all
    max_input: Annotated[int, Field(ge=16)] | None = None  # tokens; None: the benchmark's own
    balanced: bool = False  # training examples of rare answers repeated
    before: str | Overrides | None = None
    """A stage from the start to what is fine-tuned, once for all seeds: a training recipe, or its
    .yaml file or name, which grounds share."""
    fine_tune: Overrides | None = Field(default={})  # None: the start is the full model
    heal: Overrides = Field(default={})
    calibration: Overrides = Field(default={})
    report_limit: PositiveInt | None = None  # items reported, at most
    choose_limit: PositiveInt | None = None  # items that rates are chosen on, at most
    batch_size: PositiveInt = 32  # of measuring


class Variant(Settings):
    """One way to compress: settings that differ from those of its base.

    `compress: null` keeps the model whole, `heal: null` leaves it as it was compressed.
    """

    base: Name | None = None  # None: the comparison's own compress and heal
    after: Name | None = None  # its student is the result of that variant, which is healed again
    compress: Overrides | None = Field(default={})
    heal: Overrides | None = Field(default={})
    rate: Name | None = None  # whose learning rate it takes; None: its own search


class Part(Settings):
    """Cells of one table: variants × grounds × seeds."""

    variants: Annotated[tuple[Name, ...], Field(min_length=1)]
    tasks: Annotated[tuple[Name, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    focus: Name | None = None  # None: that of the comparison
    same_groups: bool = True  # whether all rows should have the groups of the focus


class HealSearch(Settings):
    """A search of healing's learning rate, of the same effort for every kind of variant.

    Judged on the part of a benchmark that is for choosing. Every variant without `rate` is tried at
    every rate of its ground; `extensions` as in a study of training.
    """

    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]  # ascending
    seed: Seed = 0  # whose fine-tuned model is healed
    heal: Overrides = Field(default={})  # what a trial has otherwise, such as fewer steps
    extensions: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _ascending(self) -> "HealSearch":
        if list(self.rates) != sorted(set(self.rates)):
            raise ValueError("rates are given in ascending order, each once")
        return self


class Latency(Settings):
    """Which rows are timed, and how; their weights stay."""

    task: Name
    seed: Seed = 0
    batches: tuple[PositiveInt, ...] = (1, 8)
    length: PositiveInt = 128  # tokens read
    turns: PositiveInt = 7


@dataclass(frozen=True)
class Resolved:
    """A variant with all that it inherits."""

    name: str
    compress: dict[str, Any] | None
    heal: dict[str, Any] | None
    after: str | None
    rate: str | None


class ComparisonRecipe(Settings):
    """A comparison: every cell follows from it."""

    kind: Literal["comparison"]
    output: str  # folder of all cells and tables
    start: str | Overrides  # a checkpoint folder; a training recipe, its .yaml file, or that's name
    fine_tune: Overrides | None = Field(default={})  # of `smelt train`, without task and output
    tasks: Annotated[dict[Name, Ground], Field(min_length=1)]
    calibration: Overrides = Field(default={})
    compress: Overrides  # what all variants share: experts or keep, budget, excluded, form
    heal: Overrides | None = None  # of `smelt heal`, without student, teacher and task
    variants: dict[Name, Variant]
    heal_search: HealSearch | None = None
    parts: Annotated[dict[Name, Part], Field(min_length=1)]  # in the order of running
    focus: Name  # the variant that others are compared with, beside the full model
    latency: Latency | None = None
    keep: Literal["needed", "all"] = "needed"  # weights: while something needs them, or always
    resamples: Annotated[int, Field(ge=100)] = 2000  # of the intervals

    @model_validator(mode="after")
    def _hangs_together(self) -> "ComparisonRecipe":
        if FULL in self.variants:
            raise ValueError(f"variants.{FULL}: there is one always; name yours otherwise")
        for name in self.variants:
            self._check_variant(name)
        for name, part in self.parts.items():
            _known(part.variants, (FULL, *self.variants), f"parts.{name}.variants")
            _known(part.tasks, tuple(self.tasks), f"parts.{name}.tasks")
            _known([part.focus or self.focus], tuple(self.variants), f"focus of parts.{name}")
        if self.latency is not None:
            _known([self.latency.task], tuple(self.tasks), "latency.task")
        for name, ground in self.tasks.items():
            if ground.text is None and (ground.benchmark or name) not in TASKS:
                raise ValueError(
                    f"tasks.{name}: there is no such benchmark; they are {', '.join(TASKS)}. Name "
                    "one as benchmark, or give a text"
                )
        return self

    def _check_variant(self, name: str) -> None:
        seen = [name]
        while (base := self.variants[seen[-1]].base) is not None:
            _known([base], tuple(self.variants), f"variants.{seen[-1]}.base")
            if base in seen:
                raise ValueError(f"variants.{name}: {' of '.join([*seen, base])} has no end")
            seen.append(base)
        one = self.resolve(name)
        if one.after is not None:
            _known([one.after], tuple(self.variants), f"variants.{name}.after")
            if self.resolve(one.after).after is not None:
                raise ValueError(f"variants.{name}.after: {one.after} comes after another one")
            if one.heal is None:
                raise ValueError(f"variants.{name}: after {one.after} nothing is left to do")
        if one.rate is not None:
            _known([one.rate], tuple(self.variants), f"variants.{name}.rate")
            lender = self.resolve(one.rate)
            if lender.rate is not None or lender.heal is None:
                raise ValueError(
                    f"variants.{name}.rate: {one.rate} has no search of its own to lend from"
                )

    def resolve(self, name: str, task: str | None = None) -> Resolved:
        """A variant with what the comparison, a ground and its bases say, later ones in force."""
        if name == FULL:
            return Resolved(FULL, None, None, None, None)
        own = self.variants[name]
        common = self.heal
        if common is not None and task is not None:
            common = merged(common, self.tasks[task].heal)
        base = Resolved("", self.compress, common, None, None)
        if own.base is not None:
            base = self.resolve(own.base, task)
        after = own.after or base.after
        given = own.model_fields_set
        compress = _inherited(own.compress, base.compress, self.compress, "compress" in given)
        heal = _inherited(own.heal, base.heal, common or {}, "heal" in given)
        if after is not None:
            compress = None
        return Resolved(name, compress, heal, after, own.rate or base.rate)


def _inherited(
    own: Mapping[str, Any] | None,
    base: Mapping[str, Any] | None,
    common: Mapping[str, Any],
    is_given: bool,
) -> dict[str, Any] | None:
    """A variant's settings; what it does not mention is as in its base, null undoes all."""
    if own is None or (base is None and not is_given):
        return None
    return merged(common if base is None else base, own)


def merged(base: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, later ones first in force: groups are joined, dotted names go into their group."""
    values = nested(base)
    for other in others:
        for key, value in other.items():
            before = values.get(key)
            if isinstance(value, Mapping) and isinstance(before, Mapping):
                values[key] = merged(before, value)
            else:
                put(values, key, nested(value) if isinstance(value, Mapping) else value)
    return values


def _known(names: Sequence[str], allowed: Sequence[str], where: str) -> None:
    for name in names:
        if name not in allowed:
            raise ValueError(f"{where}: there is no {name!r}; there are {', '.join(allowed)}")
