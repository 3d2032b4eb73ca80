"""Laws of running a study, with a stand-in for training; the last one trains."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import smelt
from smelt.errors import RecipeError
from smelt.study.runner import run_study
from smelt.study.store import Store
from smelt.study.tables import results

ROOT = Path(__file__).resolve().parents[2]


def test_everything_is_done_once_and_a_second_call_does_nothing(make, worker):
    study = make(evaluation={"tasks": ["blimp"]})
    ran = run_study(study, jobs=2)
    calls = worker()
    assert not ran.failed and len(calls) == len(set(calls)) == 6 + 2 * 7
    assert sorted(calls[:6]) == sorted(
        f"trial core/{v}/rate-{r}" for v in ("ar-moe", "samoe") for r in ("0.002", "0.004", "0.008")
    )
    assert run_study(study).done == [] and worker() == calls
    assert results(study)["unfinished"] == {}


def test_one_job_at_a_time_keeps_the_order(make, worker):
    run_study(make(evaluation={"tasks": ["blimp"]}), only="core", jobs=1)
    assert worker()[6:] == [
        f"{kind} core/{variant}/seed-{seed}"
        for seed in (0, 1)
        for variant in ("ar-moe", "samoe")
        for kind in ("train", "evaluate")
    ]


def test_a_failure_stops_nothing_else_and_is_tried_again_by_the_next_call(make, worker):
    study = make()
    worker(fail=["samoe/seed-0"])
    ran = run_study(study)
    assert ran.failed == {"core/samoe/seed-0 (train)": "as it was told"}
    assert results(study)["unfinished"] == {"core/samoe/seed-0": "failed: as it was told"}
    assert len(worker()) == 6 + 7
    worker(fail=[])
    assert run_study(study).done == ["core/samoe/seed-0 (train)"]
    assert not list(Store(study.output).folder.rglob("*.failed.json"))
    assert results(study)["unfinished"] == {}


def test_a_failed_trial_holds_back_the_cells_whose_rate_it_decides(make, worker):
    study = make()
    worker(fail=["samoe/rate-0.004"])
    assert list(run_study(study).failed) == ["core/samoe/rate-0.004 (trial)"]
    assert not [call for call in worker() if call.startswith("train")]
    said = set(results(study)["unfinished"].values())
    assert said == {"learning rate not found yet (core/ar-moe)"} | {
        "learning rate not found yet (core/samoe)"
    }


def test_a_rate_that_diverges_is_not_taken_and_no_failure(make, worker):
    nats = {"ar-moe": {"0.002": 4.0, "0.004": None, "0.008": None}}
    study = make(search__extensions=0)
    worker(nats=nats)
    assert not run_study(study).failed
    assert results(study)["rows"][0]["learning_rate"] == 0.002


def test_a_cell_made_with_other_settings_is_refused(make, worker):
    study = make()
    run_study(study, only="core")
    with pytest.raises(RecipeError, match="core/ar-moe/.*weight_decay = 0.1, the study says 0.2"):
        run_study(make(base__weight_decay=0.2))


def test_settings_that_change_no_result_may_change(make, worker):
    run_study(make(), only="core")
    assert not run_study(make(base__log_every=7), only="core").done


def test_only_one_process_runs_a_study(make, worker, monkeypatch):
    from smelt.study import runner

    monkeypatch.setattr(runner, "_GRACE", 0.3)
    study = make()
    with runner._alone(store_of(study)), pytest.raises(RecipeError, match="another process"):
        run_study(study)


def store_of(study):
    store = Store(study.output)
    store.folder.mkdir(parents=True)
    return store


def test_an_unknown_part_names_those_there_are(make):
    with pytest.raises(RecipeError, match="no part 'cor'; there are core, size"):
        run_study(make(), only="cor")


CHILD = """
import importlib.util, sys, threading, time
spec = importlib.util.spec_from_file_location("work", sys.argv[1])
work = importlib.util.module_from_spec(spec)
spec.loader.exec_module(work)
threading.Thread(target=work._end_with_parent, daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
words = [sys.executable, "-I", "-S", "-c", sys.argv[1], sys.argv[2]]
child = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
time.sleep(60)
"""


def test_the_process_of_a_job_ends_with_the_one_that_started_it_however_that_ends():
    words = [sys.executable, "-I", "-S", "-c", PARENT, CHILD]
    words.append(str(ROOT / "src/smelt/study/work.py"))
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        begin = time.monotonic()
        assert parent.stdout.read() == ""  # the end of the child's output: it has ended
        assert time.monotonic() - begin < 30


def test_the_command_lists_every_run_and_trains_nothing(tmp_path):
    words = ("study", ROOT / "recipes/study/tiny.yaml", "--set", f"output={tmp_path / 's'}")
    done = smelt(*words, "--dry-run", "--json")
    assert done.code == 0 and not (tmp_path / "s").exists()
    rows = done.json
    assert [row["run"] for row in rows][-1] == "core/samoe/seed-1" and len(rows) == 8
    assert {row["state"] for row in rows[:4]} == {"not begun"}
    assert smelt(*words, "--only", "cor").code == 2


@pytest.mark.slow
def test_the_smallest_study_runs_through_although_it_is_interrupted(tmp_path, monkeypatch):
    output = tmp_path / "study"
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    words = ["study", str(ROOT / "recipes/study/tiny.yaml"), "--set", f"output={output}"]
    store = Store(output)
    process = subprocess.Popen(
        [sys.executable, "-m", "smelt", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    begun = ("core/ar-moe/seed-0", "core/samoe/seed-0")
    until = time.monotonic() + 300
    while not any(store.run(name + ".partial").exists() for name in begun):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and str(output) in said.decode()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("training.json")}
    assert len(before) >= 4  # the trials

    done = smelt(*words, "--json")
    assert done.code == 0, done.err
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    found = done.json
    assert found == json.loads((output / "tables.json").read_text()) and not found["unfinished"]
    assert [row["seeds"] for row in found["rows"]] == [[0, 1], [0, 1]]
    assert found["differences"][0]["row"] == "core/samoe"
    weights = {path.parent.name for path in (output / "cells").glob("*/*/*/model.safetensors")}
    assert weights == {"seed-0", "seed-1"}  # those of trials are not kept
    shown = smelt(*words, "--table").out
    assert "Every cell is finished." in shown and "core/samoe" in shown
