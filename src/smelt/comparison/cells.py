"""The cells of a comparison: what is run, in which order, and whose learning rate it takes."""

from dataclasses import dataclass

from smelt.comparison.settings import FULL, ComparisonRecipe


@dataclass(frozen=True)
class Cell:
    """A variant on a ground with a seed."""

    task: str
    seed: int
    variant: str

    @property
    def id(self) -> str:
        """Where it lies: task/seed-N/variant."""
        return f"{self.task}/seed-{self.seed}/{self.variant}"

    @property
    def full(self) -> "Cell":
        """The model that it is made from."""
        return Cell(self.task, self.seed, FULL)


def cells(study: ComparisonRecipe, only: str | None = None) -> list[Cell]:
    """Every cell in the order of running: part by part, seed by seed, the full model first.

    A cell that comes after another one stands behind it; the full model of every ground and seed is
    a cell too. With `only`, all that this part asks for, and what that needs.
    """
    found: dict[str, Cell] = {}
    for name, part in study.parts.items():
        if only not in (None, name):
            continue
        for seed in part.seeds:
            for task in part.tasks:
                for variant in (FULL, *part.variants):
                    after = study.resolve(variant).after
                    for one in (after, variant) if after else (variant,):
                        cell = Cell(task, seed, one)
                        found.setdefault(cell.id, cell)
    return list(found.values())


def searched(study: ComparisonRecipe, task: str) -> list[str]:
    """The variants whose healing rate is searched on a ground: for themselves and for others."""
    if study.heal_search is None:
        return []
    found = []
    for part in study.parts.values():
        for name in part.variants if task in part.tasks else ():
            one = study.resolve(name)
            both = (one, study.resolve(one.after)) if one.after else (one,)
            found += [other.rate or other.name for other in both if other.heal is not None]
    return list(dict.fromkeys(found))


def needs_search(study: ComparisonRecipe, variant: str) -> str | None:
    """The variant whose search decides a variant's rate; None: its recipe does."""
    one = study.resolve(variant)
    if study.heal_search is None or one.heal is None:
        return None
    return one.rate or variant
