"""Several plans from the same statistics, side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from smelt.api import load_stats, open_checkpoint
from smelt.cli.screen import Screen, counts, number, size
from smelt.compress.facts import read_facts
from smelt.compress.layer_error import layer_errors
from smelt.compress.pipeline import run_plan
from smelt.compress.plan import Plan
from smelt.errors import PlanError, RecipeError
from smelt.evaluate.results import markdown
from smelt.recipe import CompressRecipe

BUDGETS = ("experts", "keep", "size")
"""The ways to say how small, one of them for a plan."""


@dataclass(frozen=True)
class Candidate:
    """A plan, or why there is none; and its error per layer, if that was measured."""

    recipe: CompressRecipe
    plan: Plan | None
    reason: str | None = None
    errors: Mapping[str, float] | None = None

    @property
    def name(self) -> str:
        """A word for the combination, good for a file name."""
        asked = self.recipe.size or self.recipe.keep or self.recipe.experts
        budget = ("size-" if self.recipe.size else "") + f"{asked:g}"
        method = self.recipe.method.replace(":", "-")
        return f"{method}-{self.recipe.form}-{budget}"

    def row(self) -> dict[str, Any]:
        """The candidate as a row of a table."""
        row: dict[str, Any] = {"method": self.recipe.method, "form": self.recipe.form}
        row["asked"] = self.recipe.size or self.recipe.keep or self.recipe.experts
        if self.plan is None:
            return row
        p = self.plan.predicted
        row["experts"] = counts([layer.num_groups for layer in self.plan.layers])
        row["parameters"] = number(p.params_after)
        least = p.bytes_after_least  # while ranks or rows are open
        row["bytes"] = ("" if least is None else f"{size(least)} to ") + size(p.bytes_after)
        row["of original"] = f"{p.bytes_after / p.bytes_before:.1%}"
        row["MoE FLOPs/token"] = number(p.moe_flops_per_token_after)
        if self.errors is not None:
            values = list(self.errors.values())
            row["mean error"] = sum(values) / len(values)
            row["worst error"] = max(values)
        return row


def candidates(
    lists: Mapping[str, Sequence[Any] | None], make: Callable[[dict[str, Any]], CompressRecipe]
) -> list[CompressRecipe]:
    """A recipe for every combination of budgets, methods and forms."""
    budgets = [{name: v} for name in BUDGETS for v in lists[name] or ()] or [{}]
    methods, forms = lists["method"] or [None], lists["form"] or [None]
    return [
        make({**budget, "method": method, "form": form})
        for method, form, budget in product(methods, forms, budgets)
    ]


def plan_all(
    source: str, stats: str, wanted: Sequence[CompressRecipe], *, measure: bool, screen: Screen
) -> list[Candidate]:
    """The plan of each recipe. One that cannot be is an error if it is the only one, else a row.

    Raises:
        PlanError: none of them can be.
    """
    checkpoint = open_checkpoint(source, trust_remote_code=wanted[0].trust_remote_code)
    facts, known = read_facts(checkpoint), load_stats(stats)
    known.belongs_to(checkpoint)
    found = []
    with screen.watching() as stages:
        for recipe in wanted:
            try:
                made = run_plan(checkpoint, known, recipe, facts)
            except (PlanError, RecipeError) as error:
                if len(wanted) == 1:
                    raise
                found.append(Candidate(recipe, None, str(error)))
                continue
            one = Candidate(recipe, made)
            if measure:
                progress = stages(f"measuring {one.name}")
                errors = layer_errors(
                    checkpoint, facts, made, known, workers=recipe.workers, progress=progress
                )
                one = Candidate(recipe, made, errors=errors)
            found.append(one)
    if all(one.plan is None for one in found):
        raise PlanError("None of these plans can be. The first: " + str(found[0].reason))
    return found


def report(
    found: Sequence[Candidate], *, source: str, stats: str, output: Path | None, screen: Screen
) -> None:
    """Save the plans where asked, and show them."""
    files = _save(found, output)
    value = [
        {**one.row(), "why_not": one.reason, "file": file, "layers": _layers(one)}
        | ({"predicted": one.plan.predicted.model_dump()} if one.plan else {})
        for one, file in zip(found, files, strict=True)
    ]
    text = markdown([one.row() for one in found])
    for one in found:
        if one.reason:
            text += f"\n{one.name}: cannot be. {one.reason}\n"
    if len(found) == 1:
        text += "\n" + markdown(_layers(found[0]))
    file = next((f for f in files if f), None)
    next_steps = (
        f"smelt apply {source} {file} OUT --stats {stats}"
        if file
        else f"smelt compress {source} OUT --stats {stats} …, or save a plan with -o"
    )
    screen.result({"plans": value, "seconds": screen.seconds}, f"{text}\nNext:  {next_steps}")


def _save(found: Sequence[Candidate], output: Path | None) -> list[Path | None]:
    """One plan goes to the file itself, several into a folder, named after what was asked."""
    if output is None:
        return [None] * len(found)
    if len(found) > 1:
        output.mkdir(parents=True)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
    files: list[Path | None] = []
    for one in found:
        file = output if len(found) == 1 else output / f"{one.name}.json"
        if one.plan is not None:
            one.plan.save(file)
        files.append(None if one.plan is None else file)
    return files


def _layers(one: Candidate) -> list[dict[str, Any]]:
    """A row per layer."""
    rows = []
    for layer in one.plan.layers if one.plan else ():
        sizes = [layer.labels.count(group) for group in range(layer.num_groups)]
        row: dict[str, Any] = {
            "layer": layer.name,
            "operator": layer.operator,
            "experts": layer.num_experts,
            "kept": layer.num_groups,
            "largest group": max(sizes),
            "bytes": size(layer.bytes_after),
        }
        if one.errors is not None:
            row["error"] = one.errors[layer.name]
        rows.append(row)
    return rows
