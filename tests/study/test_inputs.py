"""Laws of what studies read: what is not there is one message before anything runs."""

import pytest
import yaml

from commands import make_source, smelt
from smelt.errors import RecipeError
from smelt.recipe import CalibrationRecipe
from smelt.settings import check_recipe, dump_recipe
from smelt.study.inputs import check_inputs
from smelt.study.runner import run_study
from smelt.train.settings import TrainRecipe

NOT_SET = "NO_SUCH_VARIABLE"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base__text__train": ["${NO_SUCH_VARIABLE}/a.txt"]}, NOT_SET),
        ({"base__text__held_out": ["nowhere/a.txt"]}, "nowhere/a.txt: there is no such text"),
        ({"search__held_out": ["nowhere/*.txt"]}, "holds no text file"),
        ({"evaluation": {"tasks": ["blimpp"]}}, "no task 'blimpp'"),
        ({"evaluation": {"tasks": ["piqa"]}}, "piqa"),  # no file of it
    ],
)
def test_a_study_begins_only_with_all_that_it_reads(make, worker, tmp_path, changed, message):
    dump_recipe(make(output=str(tmp_path / "new" / "study"), **changed), tmp_path / "study.yaml")
    refused = smelt("study", tmp_path / "study.yaml")
    assert refused.code == 2
    assert message in refused.err and len(refused.err.splitlines()) == 1
    assert not (tmp_path / "new").exists()
    assert not worker()


def test_a_finished_study_needs_nothing_that_it_read(make, worker, monkeypatch):
    study = make(evaluation={"tasks": ["blimp"]})
    done = run_study(study).done
    calls = worker()
    monkeypatch.delenv("SMELT_DATA")
    assert done and run_study(study).done == [] and worker() == calls


def test_what_is_there_already_stays_when_a_study_is_refused(make, worker, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "notes").write_text("mine")
    dump_recipe(make(base__text__train=["nowhere/a.txt"]), tmp_path / "study.yaml")
    assert smelt("study", tmp_path / "study.yaml").code == 2
    assert (tmp_path / "study" / "notes").read_text() == "mine"
    assert not worker()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": {"a": {"text": ["${NO_SUCH_VARIABLE}/a.txt"]}}}, NOT_SET),
        ({"calibrations": {"own": {"text": ["nowhere/a.txt"]}}}, "nowhere/a.txt"),
        ({"parts": {"main": {"tasks": ["blimpp"]}}}, "no task 'blimpp'"),
        ({"models": {"tiny": "study-moe-8.yaml"}}, "SMELT_DATA"),  # that it is trained on
    ],
)
def test_a_study_of_operators_does_too(tmp_path, monkeypatch, changes, message):
    monkeypatch.delenv("SMELT_DATA", raising=False)
    make_source(tmp_path / "source")
    values = {
        "kind": "operators",
        "output": str(tmp_path / "out"),
        "models": {"tiny": str(tmp_path / "source")},
        "calibrations": {"own": {"text": ["python"]}},
        "held_out": {"a": {"text": ["python:held-out"]}},
        "variants": {"reap": {"method": "reap"}},
        "parts": {"main": {}},
    }
    file = tmp_path / "operators.yaml"
    file.write_text(yaml.safe_dump(values | changes))
    refused = smelt("study", file)
    assert refused.code == 2
    assert message in refused.err
    assert not (tmp_path / "out").exists()


def test_a_comparison_does_too(tmp_path, monkeypatch):
    monkeypatch.delenv("SMELT_DATA", raising=False)
    refused = smelt("study", "mc-smoe", "--set", f"output={tmp_path / 'out'}")
    assert refused.code == 2
    assert "SMELT_DATA" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_looked_through_to_its_tasks(values, monkeypatch):
    monkeypatch.delenv("SMELT_DATA", raising=False)
    recipe = {**values["base"], "output": "-", "learning_rate": 1e-3}
    check_inputs([check_recipe(recipe, TrainRecipe)])
    with pytest.raises(RecipeError, match="Set SMELT_DATA"):
        check_inputs([CalibrationRecipe(task={"name": "sst2"})])
    recipe |= {"text": None, "task": {"name": "sst2"}, "start": "-", "model": {}, "tokenizer": {}}
    with pytest.raises(RecipeError, match="Set SMELT_DATA"):
        check_inputs([check_recipe(recipe, TrainRecipe)])
