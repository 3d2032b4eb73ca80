"""The recipe of a study: one base run, variants of it, and parts that say which are trained."""

from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from smelt.settings import Settings, check_recipe
from smelt.text.sources import as_source
from smelt.train.settings import Sources, TrainRecipe

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
"""Of a part, a variant or a point: it becomes a folder."""
Overrides = dict[str, Any]
"""Settings of a training run by dotted names."""
OWN, BASE = "own", "base"
EQUAL_FLOPS = "equal-flops"
"""As `steps` of a point: so many that the run's FLOPs are those of the variant without the point;
`equal-flops:LABEL`, of the variant at another point of the part."""


class Search(Settings):
    """A learning-rate search of the same effort for every variant of a part.

    Every variant is tried at every rate. If the best of any of them is the lowest or the highest
    rate, one more at that end is tried, again by all, at most `extensions` times at each end.
    """

    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]  # ascending
    tokens: PositiveInt  # of a trial
    seed: Annotated[int, Field(ge=0)] = 100  # of every trial: none of the reported ones
    held_out: Sources | None = None  # what a trial is judged on; None: the held-out text of runs
    extensions: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _ascending(self) -> "Search":
        if list(self.rates) != sorted(set(self.rates)):
            raise ValueError("rates are given in ascending order, each once")
        return self


class Finetune(Settings):
    """Fine-tuning on classification, with no checkpoint picked on what is reported."""

    tasks: tuple[str, ...]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)  # of the new head and the order
    epochs: PositiveFloat = 3.0
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 5e-4
    limit: PositiveInt | None = None  # training items, at most

    def names(self) -> list[str]:
        """Of all its runs: task/seed-N."""
        return [f"{task}/seed-{seed}" for task in self.tasks for seed in self.seeds]


class Evaluation(Settings):
    """What is done with a trained cell, beside the held-out loss that training measures."""

    tasks: tuple[str, ...] = ()  # zero-shot
    limit: PositiveInt | None = None  # items of a task, at most
    batch_size: PositiveInt = 32
    finetune: Finetune | None = None
    decode_batches: tuple[PositiveInt, ...] = (1, 8, 64)  # for the table


class Part(Settings):
    """Cells that answer one question: variants × points of the axes × seeds."""

    variants: Annotated[tuple[Name, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    axes: dict[Name, dict[Name, Overrides]] = Field(default={})  # axis → point → settings
    without: tuple[str, ...] = ()  # rows that are not run, as variant/point
    settings: Overrides = Field(default={})  # of the whole part
    search: str = OWN  # own: of every variant at every point; a part: its rates; base: none
    evaluation: Evaluation | None = None  # None: the study's
    beside: str | None = None  # a row it is compared with, such as "core/{variant}"
    is_fitted: bool = False  # whether loss is fitted to sizes, per variant and text

    def points(self) -> list[tuple[str, Overrides]]:
        """Label and settings of every combination of the axes; one, without label, if none."""
        found = []
        for chosen in product(*(axis.items() for axis in self.axes.values())):
            label = "/".join(name for name, _ in chosen)
            merged = {key: value for _, point in chosen for key, value in point.items()}
            found.append((label, merged))
        return found

    def rows(self) -> list[tuple[Name, str, Overrides]]:
        """Variant, label of the point and its settings, point by point."""
        return [
            (variant, label, point)
            for label, point in self.points()
            for variant in self.variants
            if f"{variant}/{label}" not in self.without
        ]

    def beside_of(self, variant: str) -> str | None:
        """The row that a variant's rows are compared with."""
        return self.beside and self.beside.replace("{variant}", variant)

    def other(self, point: Overrides) -> str | None:
        """The label of the point whose FLOPs a point shall have; "": of none; None: its own."""
        word, _, label = str(point.get("steps")).partition(":")
        return label if word == EQUAL_FLOPS else None


class StudyRecipe(Settings):
    """A study: every cell is a training run that follows from this."""

    output: str  # folder of all cells and tables
    base: Annotated[dict[str, Any], BeforeValidator(dict)]  # a training recipe, without output
    variants: dict[Name, Overrides]
    search: Search | None = None
    evaluation: Evaluation = Evaluation()
    parts: dict[Name, Part]  # in the order of running
    keep: Annotated[str, Field(pattern="^(all|last)$")] = "last"  # last: no earlier checkpoints
    reference: Name  # the variant that others are compared with, at the same point of a part
    effects: dict[str, PositiveFloat] = Field(default={})  # nats, to reckon seeds for
    focus: Name | None = None  # the variant compared at equal cost; None: all but the reference

    @model_validator(mode="after")
    def _hangs_together(self) -> "StudyRecipe":
        if self.base.keys() & {"output", "seed", "seeds"}:
            raise ValueError("base has neither output nor seeds: every cell has its own")
        for name in ("reference", "focus"):
            if getattr(self, name) not in (None, *self.variants):
                raise ValueError(f"{name} = {getattr(self, name)!r} is no variant")
        before: list[str] = []
        for name, part in self.parts.items():
            self._check_part(name, part, before)
            before.append(name)
        return self

    def _check_part(self, name: str, part: Part, before: list[str]) -> None:
        unknown = [one for one in part.variants if one not in self.variants]
        if unknown:
            raise ValueError(
                f"parts.{name}: there is no variant {unknown[0]!r}; there are "
                f"{', '.join(self.variants)}"
            )
        if part.search == OWN and self.search is None:
            raise ValueError(
                f"parts.{name}: give search (rates, tokens), or set its search to {BASE!r}"
            )
        if part.search not in (OWN, BASE):
            lender = self.parts.get(part.search)
            if part.search not in before or lender is None or lender.search != OWN or lender.axes:
                raise ValueError(
                    f"parts.{name}.search = {part.search!r}: it is {OWN!r}, {BASE!r} or an earlier "
                    "part without axes that has a search of its own"
                )
            missing = [one for one in part.variants if one not in lender.variants]
            if missing:
                raise ValueError(f"parts.{name}: {part.search} has no rate for {missing[0]!r}")
        labels = dict(part.points())
        every = [f"{variant}/{label}" for variant in part.variants for label in labels]
        unknown = [one for one in part.without if one not in every]
        if unknown:
            raise ValueError(
                f"parts.{name}.without: there is no row {unknown[0]!r}; the rows are "
                f"{', '.join(every)}"
            )
        if not part.rows():
            raise ValueError(f"parts.{name}.without leaves no row of it")
        for variant, label, point in part.rows():
            if part.beside:
                self._check_row(name, part.beside_of(variant) or "")
            if part.other(point) not in (None, "", *labels):
                raise ValueError(
                    f"parts.{name}: steps = {point['steps']!r}, but the points are "
                    f"{', '.join(labels)}"
                )
            where = "/".join(word for word in (name, variant, label) if word)
            self.recipe(part, variant, point, origin=f"cell {where}")

    def _check_row(self, name: str, row: str) -> None:
        where, _, rest = row.partition("/")
        variant, _, label = rest.partition("/")
        part = self.parts.get(where)
        if part is None or (variant, label) not in [(one, at) for one, at, _ in part.rows()]:
            raise ValueError(
                f"parts.{name}.beside: there is no row {row!r}; write part/variant or "
                "part/variant/point, where {variant} stands for the row's own"
            )

    def recipe(
        self, part: Part, variant: str, point: Mapping[str, Any], origin: str = "cell", **more: Any
    ) -> TrainRecipe:
        """The run of a variant at a point; equal FLOPs are not reckoned, they count as one step."""
        values = nested(self.base)
        for settings in (part.settings, self.variants[variant], point, more):
            for key, value in settings.items():
                put(values, key, value)
        if str(values.get("steps")).startswith(EQUAL_FLOPS):
            values["steps"] = 1
        return check_recipe({"output": "cell", **values}, TrainRecipe, origin=origin)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose groups are copies too."""
    return {k: nested(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key in place; groups on the way are made."""
    *groups, last = key.split(".")
    for group in groups:
        inner = values.get(group)
        values[group] = inner if isinstance(inner, dict) else {}
        values = values[group]
    values[last] = value


def judged_on(search: Search) -> dict[str, Any]:
    """The settings that make a run a trial, but for its rate and its length."""
    more: dict[str, Any] = {"seed": search.seed, "keep_checkpoints": 1}
    if search.held_out is not None:
        more["text.held_out"] = [as_source(one) for one in search.held_out]
    return more
