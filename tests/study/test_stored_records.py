"""Laws of the records in benchmarks/results: the recipes that come along go on from them."""

from pathlib import Path

import pytest

from commands import smelt
from smelt.comparison.cells import needs_search
from smelt.comparison.schedule import Progress
from smelt.comparison.settings import ComparisonRecipe
from smelt.settings import load_recipe
from smelt.study.records import Records

ROOT = Path(__file__).resolve().parents[2]
RESULTS, RECIPES = ROOT / "benchmarks" / "results", ROOT / "recipes"
STORED = {
    "samoe": "study-samoe.jsonl.gz",
    "mc-smoe": "mc-smoe.jsonl.gz",
    "operators": "operators.jsonl.gz",
}


def listed(name, folder, *more):
    where = ("--set", f"output={folder}", "--records", RESULTS / STORED[name])
    return smelt("study", name, "--dry-run", "--json", *where, *more)


@pytest.mark.parametrize("name", STORED)
def test_a_study_goes_on_from_its_stored_records(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # recipes that come along are found by their names
    found = listed(name, tmp_path / "out")
    assert found.code == 0, found.err
    rows = found.json
    if name == "operators":
        assert any(row["left"] < row["cells"] for row in rows)
    else:
        assert any(row["state"] == "done" for row in rows)


def test_stored_rows_have_the_trials_that_their_rates_came_from(tmp_path):
    recipe = RECIPES / "study" / "mc-smoe.yaml"
    progress = Progress(load_recipe(recipe, ComparisonRecipe, [f"output={tmp_path}"]))
    Records(RESULTS / STORED["mc-smoe"]).restore(progress.store)
    done = [cell for cell in progress.every if progress.is_done(cell.id)]
    tasks = {cell.task for cell in done if needs_search(progress.study, cell.variant)}
    assert tasks and all(progress.rates(task).chosen for task in tasks)


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("samoe", "base.steps=7", "steps = 2932, the study says 7"),
        ("mc-smoe", "heal.steps=7", "heal.steps = 300, the recipe says 7"),
        ("operators", "fits.corrected.steps=7", "reconstruct.steps = 400, the recipe says 7"),
    ],
)
def test_a_list_says_what_a_run_would_refuse(name, setting, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = listed(name, tmp_path / "out", "--set", setting)
    assert found.code == 2 and words in found.err, found.err
