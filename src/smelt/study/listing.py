"""Every run of a study as a line: what it is and where it stands."""

from typing import Any

from smelt.study.cells import cells, model_config, searches
from smelt.study.schedule import all_rates, rates, states
from smelt.study.settings import OWN, StudyRecipe
from smelt.study.store import Store
from smelt.train.settings import TrainRecipe


def listing(study: StudyRecipe, only: str | None = None) -> list[dict[str, Any]]:
    """Trials and cells in the order of running, as rows of a table."""
    store = Store(study.output)
    chosen = all_rates(study, store)
    asked = cells(study, only)
    stands = states(study, store, asked)
    rows = []
    for name, part in study.parts.items():
        needed = {cell.search for cell in asked}
        if part.search == OWN and study.search is not None:
            grid = rates(study, store, name).grid
            for rate in grid:
                for one in searches(study, name):
                    if one.key not in needed:
                        continue
                    label, recipe = one.trial(study.search, rate)
                    done = store.trial_nats(label) is not None
                    state = "done" if done else store.failure(label) or "not begun"
                    rows.append(_row(label, recipe, rate, state))
        for cell in asked:
            if cell.part == name:
                found = chosen.get(cell.search) if cell.search else cell.recipe.learning_rate
                rows.append(_row(cell.id, cell.recipe, found, stands[cell.id]))
    return rows


def _row(name: str, recipe: TrainRecipe, rate: float | None, state: str) -> dict[str, Any]:
    row: dict[str, Any] = {"run": name, "learning rate": rate, "steps": recipe.steps}
    row["tokens"] = recipe.steps * recipe.batch_size * recipe.sequence_length
    if recipe.model.model_type == "samoe":
        config = model_config(recipe)
        row["parameters"] = config.num_params()
        row["FLOPs/token"] = config.flops_per_token(recipe.sequence_length // 2)
    return row | {"state": state}
