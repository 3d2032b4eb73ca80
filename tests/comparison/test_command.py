"""The command: it tells the two kinds of study apart, lists jobs, and says what is wrong."""

import json
from pathlib import Path

import yaml

from commands import smelt

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "study"


def test_the_command_lists_every_job_and_runs_nothing(tmp_path):
    words = ("study", RECIPES / "mc-smoe-tiny.yaml", "--set", f"output={tmp_path / 'c'}")
    done = smelt(*words, "--dry-run", "--json")
    assert done.code == 0 and not (tmp_path / "c").exists()
    jobs = [row["job"] for row in done.json]
    assert jobs[:3] == ["start", "prose/seed-0/full", "prose/search/m-smoe/rate-0.0003"]
    assert len(jobs) == len(set(jobs)) and done.json[2]["measured on"] == "choose"
    assert smelt(*words, "--only", "mian").code == 2
    assert "no part 'mian'; there are main, healing" in smelt(*words, "--only", "mian").err


def test_the_tables_of_the_paper_are_jobs_of_one_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # recipes that come along are found by their names
    rows = smelt("study", "mc-smoe", "--dry-run", "--json").json
    assert rows[0]["job"] == "start"  # the Switch that all of it begins with
    cells = {row["job"] for row in rows if "/seed-" in row["job"]}
    for task in ("sst2", "mrpc", "wikiqa", "squad"):
        for seed in range(3):
            for name in ("full", "m-smoe", "mc-smoe", "zipit", "repair", "git-rebasin", "fisher"):
                assert f"{task}/seed-{seed}/{name}" in cells
    for task in ("multirc", "copa", "winogrande", "hotpotqa"):
        own = {cell for cell in cells if cell.startswith(f"{task}/")}
        assert {f"{task}/seed-0/full", f"{task}/seed-0/mc-smoe", f"{task}/seed-0/zipit"} <= own
        assert all("/seed-0/" in cell for cell in own)
    for name in ("uniform", "sim-gradient", "unaligned", "ce-only", "compress-only"):
        assert {f"sst2/seed-2/{name}", f"wikiqa/seed-2/{name}"} <= cells
    assert all(row["measured on"] == "choose" for row in rows if "/search/" in row["job"])


def test_a_start_that_is_named_is_not_trained(tmp_path):
    words = ("study", "mc-smoe", "--dry-run", "--json")
    rows = smelt(*words, "--set", f"start={tmp_path}").json
    assert rows[0]["job"] == "sst2/seed-0/full"
    done = smelt(*words, "--set", "start=${NOT_SET_HERE}")
    assert done.code == 2 and "NOT_SET_HERE, which is not set" in done.err


def test_a_name_that_no_recipe_has_is_told_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = smelt("study", "mc-smo", "--dry-run")
    assert done.code == 2 and "one of mc-smoe, mc-smoe-tiny, operators, samoe, tiny" in done.err
    (tmp_path / "tiny").write_text("variants: 1\n")  # a file of that name is what is meant
    assert "variants" in smelt("study", "tiny", "--dry-run").err


def test_options_of_the_other_kind_of_study_are_refused(tmp_path):
    assert "--latency is of comparisons" in smelt("study", RECIPES / "tiny.yaml", "--latency").err
    done = smelt("study", RECIPES / "mc-smoe-tiny.yaml", "--table", "--decode")
    assert done.code == 2 and "a comparison has --latency" in done.err
    words = ("study", RECIPES / "mc-smoe-tiny.yaml", "--set", f"output={tmp_path / 'c'}")
    assert "Nothing to time" in smelt(*words, "--table", "--latency").err


def test_a_misspelt_setting_names_those_there_are(tmp_path):
    values = yaml.safe_load((RECIPES / "mc-smoe-tiny.yaml").read_text())
    values["varients"] = values.pop("variants")
    (tmp_path / "wrong.yaml").write_text(json.dumps(values))
    done = smelt("study", tmp_path / "wrong.yaml")
    assert done.code == 2 and "no setting 'varients'" in done.err and "variants" in done.err
    values["kind"] = "comparision"
    (tmp_path / "wrong.yaml").write_text(json.dumps(values))
    assert "comparison" in smelt("study", tmp_path / "wrong.yaml").err


def test_statistics_are_of_a_text_or_of_a_task():
    done = smelt("calibrate", "source", "stats", "--task", "sst2", "--text", "a.txt")
    assert done.code == 2 and "--text and --task" in done.err
