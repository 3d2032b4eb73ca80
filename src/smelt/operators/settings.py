"""What a study of operators consists of: models, texts, ratios, seeds, variants, and its parts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from smelt.compress.check import needs_gradients
from smelt.compress.methods import resolve
from smelt.errors import RecipeError
from smelt.recipe import CalibrationRecipe, CompressRecipe
from smelt.settings import Settings, check_recipe

NO_FIT = "none"
"""The name of the fit that is none."""


class Texts(Settings):
    """Text that a model is calibrated on, or held out."""

    text: tuple[str, ...]
    num_tokens: int = Field(default=65_536, ge=1)
    sequence_length: int = Field(default=256, ge=2)
    batch_size: int = Field(default=16, ge=1)


class Part(Settings):
    """Cells: every combination of what is named here; None stands for all there are."""

    models: tuple[str, ...] | None = None
    calibrations: tuple[str, ...] | None = None
    keep: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None
    variants: tuple[str, ...] | None = None
    fits: tuple[str, ...] | None = None
    tasks: tuple[str, ...] = ()  # zero-shot tasks asked as well


class OperatorsRecipe(Settings):
    """A study of operators: each variant, with each fit, at each ratio, on each text and seed."""

    kind: Literal["operators"]
    output: str
    models: dict[str, str] = Field(min_length=1)  # by name: a folder, or the recipe of a training
    calibrations: dict[str, Texts] = Field(min_length=1)
    held_out: dict[str, Texts] = Field(min_length=1)
    keep: tuple[float, ...] = (0.75, 0.5, 0.25)
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: dict[str, dict[str, Any]] = Field(min_length=1)  # settings of a compression
    fits: dict[str, dict[str, Any]] = Field(default={})  # of a reconstruction; `none` is always one
    baselines: tuple[str, ...] = ()  # variants, unfitted, that the best is taken of
    task_limit: int | None = 200
    parts: dict[str, Part] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        known: dict[str, Mapping[str, Any]] = {
            "models": self.models,
            "calibrations": self.calibrations,
            "variants": self.variants,
            "fits": self.all_fits,
        }
        for name, part in self.parts.items():
            for field, there in known.items():
                for one in getattr(part, field) or ():
                    if one not in there:
                        raise ValueError(
                            f"part {name}: there is no {one!r} among {field}: {', '.join(there)}"
                        )
        if wrong := [name for name in self.baselines if name not in self.variants]:
            raise ValueError(f"baselines: there is no variant {wrong[0]!r}")
        return self

    @property
    def all_fits(self) -> dict[str, dict[str, Any] | None]:
        """Every fit by name, none first."""
        return {NO_FIT: None, **self.fits}

    def compression(self, group: "Group", variant: str, fit: str) -> CompressRecipe:
        """The recipe of a cell; source and output are the worker's.

        Raises:
            RecipeError: settings that a compression does not have.
        """
        texts = self.calibrations[group.calibration]
        values = {
            "source": "-",
            "output": "-",
            "keep": group.keep,
            "calibration": {**texts.model_dump(), "seed": group.seed},
            "seed": group.seed,
            **self.variants[variant],
        }
        if self.all_fits[fit] is not None:
            values["reconstruct"] = self.all_fits[fit]
        return check_recipe(values, CompressRecipe, origin=f"variant {variant}, fit {fit}")

    def calibration(self, group: "Group") -> CalibrationRecipe:
        """What a group's statistics are taken from; gradients where some cell reads them."""
        cells = [
            self.compression(one.group, *cell)
            for one in asked(self)
            if one.group.statistics == group.statistics
            for cell in one.cells
        ]
        values = {
            **self.calibrations[group.calibration].model_dump(),
            "seed": group.seed,
            "gradients": any(needs_gradients(resolve(cell)) for cell in cells),
        }
        return check_recipe(values, CalibrationRecipe)


@dataclass(frozen=True)
class Group:
    """The cells of one model, text, seed and ratio: one process does them, one after the other."""

    model: str
    calibration: str
    seed: int
    keep: float

    @property
    def id(self) -> str:
        return f"{self.statistics}/keep-{self.keep:g}"

    @property
    def statistics(self) -> str:
        """The name of the statistics that its cells share with other ratios."""
        return f"{self.model}/{self.calibration}-seed-{self.seed}"


@dataclass(frozen=True)
class Asked:
    """What is wanted of a group: cells by variant and fit, and the tasks of each."""

    group: Group
    cells: dict[tuple[str, str], tuple[str, ...]]


def asked(study: OperatorsRecipe, only: str | None = None) -> list[Asked]:
    """All groups of a study, or of one part, in the order in which they are done.

    Raises:
        RecipeError: no such part.
    """
    if only is not None and only not in study.parts:
        raise RecipeError(f"There is no part {only!r}; there are {', '.join(study.parts)}.")
    found: dict[Group, dict[tuple[str, str], tuple[str, ...]]] = {}
    for name, part in study.parts.items():
        if only in (None, name):
            for group in _groups(study, part):
                cells = found.setdefault(group, {})
                for variant in part.variants or study.variants:
                    for fit in part.fits or study.all_fits:
                        before = cells.get((variant, fit), ())
                        more = tuple(task for task in part.tasks if task not in before)
                        cells[variant, fit] = before + more
    return [Asked(group, cells) for group, cells in found.items()]


def _groups(study: OperatorsRecipe, part: Part) -> Iterator[Group]:
    for seed in study.seeds if part.seeds is None else part.seeds:
        for model in part.models or study.models:
            for calibration in part.calibrations or study.calibrations:
                for keep in part.keep or study.keep:
                    yield Group(model, calibration, seed, keep)
