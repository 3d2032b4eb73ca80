"""The cells of a study: every one a name and the training recipe that it stands for."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from smelt.errors import RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.study.settings import BASE, EQUAL_FLOPS, OWN, Part, Search, StudyRecipe, judged_on
from smelt.train.settings import TrainRecipe


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    `recipe` has the base's learning rate until the search named by `search` is done; None: it
    keeps it.
    """

    id: str  # part/variant[/point…]/seed-N, also where it lies
    part: str
    variant: str
    point: str  # labels of the axes' points; "": no axes
    seed: int
    recipe: TrainRecipe
    search: str | None  # part/variant[/point…]

    def at(self, rate: float | None) -> TrainRecipe:
        """The recipe with the rate that was found."""
        return self.recipe if rate is None else _with(self.recipe, learning_rate=rate)


@dataclass(frozen=True)
class Searched:
    """What a search is about: one variant, at one point of its part."""

    key: str
    part: str
    variant: str
    recipe: TrainRecipe  # of a cell, whose rate is to be found

    def trial(self, search: Search, rate: float) -> tuple[str, TrainRecipe]:
        """Name and recipe of the trial of one rate: a short run with the same shape of schedule."""
        recipe = self.recipe
        a_step = recipe.batch_size * recipe.sequence_length
        steps = max(1, round(search.tokens / a_step))
        short = {
            "learning_rate": rate,
            "steps": steps,
            "warmup_steps": round(recipe.warmup_steps * steps / recipe.steps),
            "evaluate_every": steps,
            "checkpoint_every": steps,
        }
        return f"{self.key}/rate-{rate:g}", _with(recipe, **short, **judged_on(search))


def cells(study: StudyRecipe, only: str | None = None) -> list[Cell]:
    """Every cell in the order of running: seed by seed, so that what is done is always complete.

    A run that two parts ask for is one cell, of the earlier part. With `only`, all that this part
    asks for.
    """
    asked = [first for cell, first in twins(study) if only in (None, cell.part)]
    return list({cell.id: cell for cell in asked}.values())


def twins(study: StudyRecipe) -> list[tuple[Cell, Cell]]:
    """Every cell that a part asks for, and the one that is run for it: mostly itself."""
    first: dict[str, Cell] = {}
    every = (cell for name, part in study.parts.items() for cell in _cells_of(study, name, part))
    return [(cell, first.setdefault(_identity(cell), cell)) for cell in every]


def searches(study: StudyRecipe, name: str) -> list[Searched]:
    """The searches of a part that has its own."""
    part = study.parts[name]
    if part.search != OWN:
        return []
    return [
        Searched(_join(name, variant, label), name, variant, _recipe(study, part, variant, point))
        for variant, label, point in part.rows()
    ]


def _cells_of(study: StudyRecipe, name: str, part: Part) -> Iterator[Cell]:
    for seed in part.seeds:
        for variant, label, point in part.rows():
            recipe = _recipe(study, part, variant, point, seed=seed)
            search = {OWN: _join(name, variant, label), BASE: None}.get(
                part.search, _join(part.search, variant)
            )
            where = _join(name, variant, label, f"seed-{seed}")
            yield Cell(where, name, variant, label, seed, recipe, search)


def _recipe(
    study: StudyRecipe, part: Part, variant: str, point: Mapping[str, Any], **more: Any
) -> TrainRecipe:
    recipe = study.recipe(part, variant, point, **more)
    other = part.other(dict(point))
    if other is None:
        return recipe
    plain = study.recipe(part, variant, {"": {}, **dict(part.points())}[other], **more)
    share = training_flops_per_token(plain) / training_flops_per_token(recipe)
    a_step = recipe.batch_size * recipe.sequence_length
    plain_step = plain.batch_size * plain.sequence_length
    steps = max(1, round(plain.steps * plain_step * share / a_step))
    warmup = round(plain.warmup_steps * steps / plain.steps)
    return _with(recipe, steps=steps, warmup_steps=warmup)


def training_flops_per_token(recipe: TrainRecipe) -> int:
    """Three times a forward in the middle of a sequence: forward and backward of every product."""
    return 3 * model_config(recipe).flops_per_token(recipe.sequence_length // 2)


def model_config(recipe: TrainRecipe) -> SaMoEConfig:
    """The configuration of the recipe's model, its vocabulary as large as the recipe says.

    Raises:
        RecipeError: another family, or a vocabulary that the recipe does not tell.
    """
    fields = recipe.model.fields()
    vocabulary = fields.get("vocab_size", recipe.tokenizer.vocab_size)
    if recipe.model.model_type != "samoe" or vocabulary is None:
        raise RecipeError(
            f"steps: {EQUAL_FLOPS} and matched comparisons need model_type samoe and "
            "tokenizer.vocab_size: FLOPs are known for these."
        )
    fields["vocab_size"] = vocabulary
    if recipe.model.preset is None:
        return SaMoEConfig(**fields)
    return SaMoEConfig.from_preset(recipe.model.preset, **fields)


def _identity(cell: Cell) -> str:
    values = cell.recipe.model_dump(mode="json", exclude={"output", "learning_rate"})
    rate = cell.search or cell.recipe.learning_rate
    return json.dumps([values, rate], sort_keys=True)


def _with(recipe: TrainRecipe, **changed: Any) -> TrainRecipe:
    """The recipe with some settings changed, checked again."""
    values = recipe.model_dump()
    for key, value in changed.items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value
    return TrainRecipe.model_validate(values)


def _join(*words: str) -> str:
    return "/".join(word for word in words if word)
