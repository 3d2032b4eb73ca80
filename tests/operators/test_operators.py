"""Laws of a study of operators: cells are done once, alone, and tables are made of their rows."""

import copy
import json
import math
import subprocess

import pytest
import yaml

from commands import make_source, smelt
from smelt import api
from smelt.errors import RecipeError
from smelt.operators.runner import WORK, Progress
from smelt.operators.settings import OperatorsRecipe, asked
from smelt.settings import check_recipe, dump_recipe


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operators")
    make_source(folder / "source")
    text = {"text": [str(folder / "text.txt")], "sequence_length": 32, "batch_size": 4}
    return {
        "kind": "operators",
        "output": str(folder / "out"),
        "models": {"tiny": str(folder / "source")},
        "calibrations": {"own": {**text, "num_tokens": 2000}},
        "held_out": {"a": {**text, "num_tokens": 500}, "b": {**text, "num_tokens": 300}},
        "keep": [0.5],
        "seeds": [0, 1],
        "baselines": ["reap", "frequency"],
        "variants": {
            "reap": {"method": "reap"},
            "frequency": {"method": "frequency"},
            "fisher": {"method": "fisher"},
            "mapped": {"method": "redirect", "form": "mapped", "budget": "uniform"},
        },
        "fits": {"short": {"steps": 5, "batch_tokens": 128}},
        "parts": {
            "main": {},
            "mapped": {"variants": ["mapped"], "fits": ["none"], "seeds": [0]},
        },
    }


def recipe(values, **changes):
    return check_recipe({**values, **changes}, OperatorsRecipe)


@pytest.fixture(scope="module")
def study(values, tmp_path_factory):
    """The study, done once: its recipe, its file, and what the command said."""
    made = recipe(values)
    path = tmp_path_factory.mktemp("recipe") / "operators.yaml"
    dump_recipe(made, path)
    records = path.with_name("records.jsonl")
    done = smelt("study", path, "--jobs", 1, "--records", records)
    assert done.code == 0, done.err
    return made, path, records, done


def test_every_cell_has_a_row_and_the_table_shows_it(study):
    _, path, _, done = study
    rows = smelt("study", path, "--table", "--json").json
    assert len(rows) == 2 * 4 * 2
    for row in rows:
        assert set(row["nats"]) == set(row["original"]["nats"]) == {"a", "b"}
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 1e8
        assert row["experts"] == [4, 4]
        assert len(row["errors"]) == (2 if row["fit"] == "short" else 0)
    reap = [r for r in rows if (r["variant"], r["fit"]) == ("reap", "none")]
    mean = sum(math.exp(r["nats"]["a"] - r["original"]["nats"]["a"]) for r in reap) / 2
    assert f"| reap | none | {mean:.3f} ± " in " ".join(done.out.split())
    assert "cells are left" not in done.out


def test_a_cell_is_what_the_commands_make_of_its_settings(study, values, tmp_path):
    _, path, _, _ = study
    rows = smelt("study", path, "--table", "--json").json
    row = next(r for r in rows if (r["variant"], r["fit"], r["seed"]) == ("reap", "short", 1))
    calibration = {**values["calibrations"]["own"], "seed": 1}
    api.compress(
        values["models"]["tiny"],
        tmp_path / "out",
        keep=0.5,
        method="reap",
        reconstruct=values["fits"]["short"],
        seed=1,
        calibration=calibration,
    )
    plan = json.loads((tmp_path / "out" / "smelt" / "plan.json").read_text())
    fits = [[layer["fit"]["before"], layer["fit"]["after"]] for layer in plan["layers"]]
    assert row["errors"] == fits


def test_what_is_done_is_not_done_again(study, monkeypatch):
    _, path, _, _ = study
    ran = api.study(path)
    assert len(ran["rows"]) == 16
    assert not ran["failed"]
    dry = smelt("study", path, "--dry-run", "--json").json
    assert {group["left"] for group in dry} == {0}


def test_records_lay_a_study_out_elsewhere(study, tmp_path):
    _, path, records, done = study
    elsewhere = ["--set", f"output={tmp_path / 'new'}", "--records", records]
    again = smelt("study", path, "--table", *elsewhere)
    assert again.code == 0
    assert again.out == done.out


def test_cells_that_a_killed_process_had_measured_are_added_to_the_file(study, tmp_path):
    _, path, records, _ = study
    whole = [json.loads(line) for line in records.read_text().splitlines()]
    cut = copy.deepcopy(whole)
    cut[-1]["files"]["json"]["rows"].popitem()
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(line) + "\n" for line in cut))
    assert smelt("study", path, "--records", tmp_path / "cut.jsonl").code == 0
    lines = [json.loads(line) for line in (tmp_path / "cut.jsonl").read_text().splitlines()]
    assert len(lines) == len(whole) + 1 and lines[-1]["files"] == whole[-1]["files"]


@pytest.mark.usefixtures("study")
def test_a_new_variant_adds_its_cells_alone(values, tmp_path):
    more = {**values["variants"], "hc-smoe": {"method": "hc-smoe"}}
    wider = recipe(values, variants=more)
    dump_recipe(wider, tmp_path / "wider.yaml")
    dry = smelt("study", tmp_path / "wider.yaml", "--dry-run", "--json").json
    assert [group["left"] for group in dry] == [2, 2]


@pytest.mark.data
def test_tasks_that_are_asked_later_are_asked_of_the_original_too(values, tmp_path):
    part = {"variants": ["reap"], "fits": ["none"], "seeds": [0]}
    given = {**values, "output": str(tmp_path / "out"), "task_limit": 3, "variants": {}, "fits": {}}
    given |= {"variants": {"reap": {"method": "reap"}}, "baselines": []}
    for number, tasks in enumerate(([], ["copa"], ["copa", "lambada"])):
        path = tmp_path / f"{number}.yaml"
        dump_recipe(recipe(given, parts={"a": {**part, "tasks": tasks}}), path)
        done = smelt("study", path, "--json")
        assert done.code == 0, done.err
        (row,) = done.json
        assert set(row["tasks"]) == set(row["original"]["tasks"]) == set(tasks)
        assert set(row["nats"]) == set(row["original"]["nats"]) == {"a", "b"}
        for task in tasks:
            for own, first in zip(row["tasks"][task], row["original"]["tasks"][task], strict=True):
                less = own["difference"]
                assert less["mean"] == pytest.approx(own["value"] - first["value"])
                assert less["low"] <= less["mean"] <= less["high"]
                assert less["n"] == own["n"]
                assert first["difference"] is None
    shown = smelt("study", path, "--table").out
    assert f"[{less['low']:+.3f}, {less['high']:+.3f}]" in shown


def test_a_part_names_its_cells(values):
    found = asked(recipe(values), "mapped")
    assert [(one.group.seed, list(one.cells)) for one in found] == [(0, [("mapped", "none")])]
    with pytest.raises(RecipeError, match="main, mapped"):
        asked(recipe(values), "other")


def test_a_finished_cell_of_other_settings_is_refused(study, values, tmp_path):
    changed = {**values["variants"], "reap": {"method": "reap", "protect": [1]}}
    dump_recipe(recipe(values, variants=changed), tmp_path / "changed.yaml")
    refused = smelt("study", tmp_path / "changed.yaml")
    assert refused.code == 2
    assert "protect" in refused.err


def test_cells_of_another_checkpoint_are_not_mixed_with_the_models(study, tmp_path):
    _, path, records, _ = study
    make_source(tmp_path / "other", seed=1)
    before = records.read_bytes()
    for words in (["--records", records], ["--table", "--records", records], ["--dry-run"]):
        new = [*words, "--set", f"models.tiny={tmp_path / 'other'}"]
        if "--dry-run" not in words:
            new += ["--set", f"output={tmp_path / 'out'}"]
        refused = smelt("study", path, *new)
        assert refused.code == 2
        assert "another checkpoint" in refused.err and "other" in refused.err
    assert records.read_bytes() == before
    assert not list(tmp_path.glob("out/cells/**/*.stats"))


def test_a_job_refuses_a_model_trained_anew(study, tmp_path):
    made, _, _, _ = study
    (group,) = {one.group.id for one in asked(made) if one.group.seed == 1}
    written = yaml.safe_load(Progress(made).store.beside(group, "yaml").read_text())
    for fingerprint, code in ((written["fingerprint"], 0), ("0" * 64, 2)):
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({**written, "fingerprint": fingerprint}))
        with subprocess.Popen(
            [*WORK, str(tmp_path / "job.yaml")], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as job:  # it ends with its standard input
            assert job.wait(120) == code
            assert job.stderr is not None
            assert (b"another checkpoint" in job.stderr.read()) == bool(code)


def test_a_table_is_of_one_checkpoint_for_each_model(study, tmp_path):
    _, path, records, _ = study
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[-1]["files"]["json"]["original"]["fingerprint"] = "0" * 64
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    new = ["--set", f"output={tmp_path / 'out'}", "--records", tmp_path / "two.jsonl"]
    refused = smelt("study", path, "--table", *new)
    assert refused.code == 2
    assert "two checkpoints" in refused.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": {"a": {"variants": ["no"]}}}, "there is no 'no' among variants"),
        ({"parts": {"a": {"fits": ["no"]}}}, "among fits"),
        ({"baselines": ["no"]}, "no variant 'no'"),
        ({"models": {}}, "models"),
    ],
)
def test_names_that_are_not_there_are_refused(values, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(values, **changes)


def test_a_variant_that_cannot_be_is_named_before_anything_runs(values, tmp_path):
    wrong = recipe(
        {**values, "parts": {"main": {}}},
        output=str(tmp_path / "out"),
        variants={"x": {"metod": "reap"}},
        baselines=[],
    )
    dump_recipe(wrong, tmp_path / "wrong.yaml")
    refused = smelt("study", tmp_path / "wrong.yaml")
    assert refused.code == 2
    assert "variant x" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_checkpoint_is_named_before_anything_runs(values, tmp_path):
    out = tmp_path / "out"
    path = tmp_path / "operators.yaml"
    dump_recipe(recipe(values, output=str(out), models={"tiny": str(tmp_path)}), path)
    done = smelt("study", path)
    assert done.code == 2
    assert "models.tiny" in done.err
    assert not (out / "cells").exists()


def test_gradients_are_taken_where_some_cell_reads_them(values):
    study = recipe(values)
    every = [one.group for one in asked(study)]
    assert all(study.calibration(group).gradients for group in every)
    without = recipe(values, parts={"main": {"variants": ["reap"]}})
    assert not any(without.calibration(group).gradients for group in every)
    first = {"variants": ["fisher"], "seeds": [0]}
    one_seed = recipe(values, parts={"main": {"variants": ["reap"]}, "fisher": first})
    assert {g.seed for g in every if one_seed.calibration(g).gradients} == {0}
