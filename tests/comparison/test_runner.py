"""Laws of running a comparison, with a stand-in for all work."""

import json

import pytest

from smelt.comparison.listing import listing
from smelt.comparison.markdown import report
from smelt.comparison.runner import run_comparison
from smelt.comparison.schedule import Progress
from smelt.comparison.tables import results
from smelt.errors import CalibrationError, RecipeError
from smelt.study.records import Records

TRIALS = [
    f"sst2/search/{name}/rate-{rate}"
    for rate in ("0.001", "0.002")
    for name in ("m-smoe", "mc-smoe")
]
FIRST = [f"sst2/seed-0/{name}" for name in ("m-smoe", "average", "mc-smoe", "twice")]
ALL = [
    "sst2/seed-0/full",
    *TRIALS,
    *FIRST,
    "sst2/seed-1/full",
    *[name.replace("seed-0", "seed-1") for name in FIRST],
    "sst2/seed-0/other",
    "sst2/seed-0/unhealed",
]

INTERRUPTED = (TRIALS[1], "sst2/seed-0/m-smoe", "sst2/seed-0/twice")


def test_everything_is_done_once_in_order_and_a_second_call_does_nothing(make, worker):
    study = make()
    ran = run_comparison(study, jobs=1)
    assert not ran.failed and worker() == ran.done == ALL
    assert run_comparison(study, jobs=1).done == [] and worker() == ALL
    assert results(study)["unfinished"] == {}


def test_a_stage_before_a_ground_is_run_once_and_first(make, worker):
    study = make(tasks__sst2__before={"task": {"name": "sst2"}, "steps": 3})
    listed = [row["job"] for row in listing(study)]
    assert listed[0] == "sst2/before" and listed.count("sst2/before") == 1
    assert Progress(study).states()["sst2/seed-0/full"] == "waits for sst2/before"
    worker(fail=["sst2/before"])
    assert list(run_comparison(study, jobs=1).failed) == ["sst2/before"]
    worker(fail=[])
    assert run_comparison(study, jobs=2).done[0] == "sst2/before"
    done = worker()[1:]
    assert done[0] == "sst2/before" and sorted(done[1:]) == sorted(ALL)


@pytest.mark.parametrize(
    ("added", "again"),
    [
        ({"base": "m-smoe", "heal": None}, ["full"]),
        ({"after": "m-smoe", "rate": "mc-smoe"}, ["full", "m-smoe"]),
    ],
)
@pytest.mark.parametrize("tuned", [True, False])
def test_models_that_a_new_variant_is_made_from_are_made_again(make, worker, added, again, tuned):
    if not tuned:  # the start is the full model: its statistics go, its weights stay
        make(tasks__sst2__fine_tune=None)
    run_comparison(make(), jobs=1)
    folder = Progress(make()).store.run("sst2/seed-0/full")
    assert not list(folder.glob("*.safetensors"))  # nothing needed it any more
    assert not list(folder.with_name("full.stats").glob("*"))
    part = {"variants": ["m-smoe", "added"], "tasks": ["sst2"], "seeds": [0]}
    wider = make(variants__added=added, parts__added=part)
    assert run_comparison(wider, only="main", jobs=1).done == []  # which does not ask for it
    jobs = [f"sst2/seed-0/{name}" for name in (*again, "added")]
    assert run_comparison(wider, jobs=1).done == jobs
    assert run_comparison(wider, jobs=1).done == []


def test_an_interrupted_comparison_does_the_jobs_of_an_uninterrupted_one(make, worker):
    for failing in INTERRUPTED:
        worker(fail=[failing])
        assert list(run_comparison(make(), jobs=2).failed) == [failing]
    worker(fail=[])
    run_comparison(make(), jobs=2)
    done = worker()
    for failed in INTERRUPTED:
        done.remove(failed)  # the call that failed
    assert sorted(done) == sorted(ALL)


def test_a_variant_that_fails_stops_only_what_comes_after_it(make, worker):
    worker(fail=["sst2/seed-0/m-smoe"])
    ran = run_comparison(make(), jobs=1)
    assert ran.failed == {"sst2/seed-0/m-smoe": "as it was told"}
    assert set(ran.done) == set(ALL) - {"sst2/seed-0/m-smoe", "sst2/seed-0/twice"}
    left = results(make())["unfinished"]
    assert left == {
        "sst2/seed-0/m-smoe": "failed: as it was told",
        "sst2/seed-0/twice": "waits for sst2/seed-0/m-smoe",
    }


def test_the_rate_with_the_least_loss_is_taken_by_all_of_the_kind(make, worker):
    worker(loss={"rate-0.001": -0.5, "rate-0.002": -0.7})
    study = make()
    run_comparison(study)
    rates = {row["row"]: row["learning_rates"] for row in results(study)["tables"][0]["rows"]}
    assert rates.pop("full") == [0.0]
    assert rates == {name: [0.002] for name in ("m-smoe", "average", "mc-smoe", "twice")}
    chosen = {one["variant"]: one["chosen"] for one in results(study)["learning_rates"]}
    assert chosen == {"m-smoe": 0.002, "mc-smoe": 0.002}


def test_a_part_alone_runs_what_it_needs(make, worker):
    run_comparison(make(), only="more", jobs=1)
    assert worker() == ["sst2/seed-0/full", *TRIALS, "sst2/seed-0/other", "sst2/seed-0/unhealed"]


def test_weights_go_when_nothing_needs_them_and_not_before(make, worker):
    study = make(latency={"task": "sst2", "seed": 1})
    run_comparison(study, only="main", jobs=1)

    def kept():
        found = Progress(study).store.folder.rglob("*.safetensors")
        return sorted(str(path.parent).split("cells/")[1] for path in found)

    timed = [f"sst2/seed-1/{name}" for name in ("average", "full", "m-smoe", "mc-smoe", "twice")]
    assert kept() == ["sst2/seed-0/full", *timed]  # the second part is made from it
    run_comparison(study, jobs=1)
    assert kept() == timed
    assert not list(Progress(study).store.run("sst2/seed-0/full.stats").glob("*"))


def test_a_finished_cell_with_other_settings_is_refused(make, worker):
    study = make()
    before = Progress(study).works.full(Progress(study).asked[0]).model_dump(mode="json")
    worker(settings={"sst2/seed-0/full": json.dumps(before)})
    run_comparison(study, only="more")
    assert run_comparison(make(), only="more").done == []
    with pytest.raises(RecipeError, match="seed-0/full was made with train.steps = 6, .* says 9"):
        run_comparison(make(tasks__sst2__fine_tune={"steps": 9}))


def test_tables_hold_rows_against_the_full_model_and_the_focus(make, worker):
    worker(hits={"m-smoe": 2, "average": -1})
    study = make()
    run_comparison(study)
    main, more = results(study)["tables"]
    rows = {row["row"]: row["metrics"]["accuracy"] for row in main["rows"]}
    assert list(rows) == ["full", "m-smoe", "average", "mc-smoe", "twice"]
    assert rows["average"]["less_full"]["mean"] == pytest.approx(-0.1)
    assert rows["average"]["less_focus"]["mean"] == pytest.approx(-0.3)
    assert rows["m-smoe"]["less_focus"] is None and rows["full"]["less_full"] is None
    assert rows["m-smoe"]["less_full"]["seeds"] == 2 and rows["m-smoe"]["less_full"]["units"] == 10
    assert rows["m-smoe"]["less_full"]["low"] < 0.2 < rows["m-smoe"]["less_full"]["high"]
    assert main["other_groups"] == [] and more["other_groups"] == ["other"]
    assert json.loads((Progress(study).store.folder / "tables.json").read_text())["tables"]


def test_an_unknown_part_names_those_there_are(make):
    with pytest.raises(RecipeError, match="no part 'mian'; there are main, more"):
        run_comparison(make(), only="mian")


def test_a_comparison_goes_on_elsewhere_from_its_records(make, worker, tmp_path):
    whole = make()
    run_comparison(whole, jobs=1)
    assert worker() == ALL
    records = Records(tmp_path / "records.jsonl.gz")
    here = make(output=str(tmp_path / "here"))
    run_comparison(here, only="main", jobs=1, records=records)
    there = make(output=str(tmp_path / "there"))
    ran = run_comparison(there, jobs=1, records=records)
    # the weights that the rest is made from, and no other model again
    assert ran.done == ["sst2/seed-0/full", "sst2/seed-0/other", "sst2/seed-0/unhealed"]
    assert results(there) == results(whole)


def test_tables_of_records_leave_nothing_out_and_the_list_says_what_is_made_again(
    make, worker, tmp_path
):
    records = Records(tmp_path / "records.jsonl")
    whole = make()
    run_comparison(whole, only="main", records=records)
    assert worker()
    there = make(output=str(tmp_path / "there"))
    records.restore(Progress(there).store)
    assert results(there)["tables"] == results(whole)["tables"]  # of seed 0 a part is not done
    again = [row["job"] for row in listing(there) if row["state"].startswith("again")]
    assert again == ["sst2/seed-0/full"]
    assert not [row for row in listing(there, "main") if row["state"] != "done"]


def test_what_was_done_without_the_file_is_added_to_it(make, worker, tmp_path):
    records = Records(tmp_path / "records.jsonl")
    study = make()
    run_comparison(study, only="main")
    assert worker()
    run_comparison(study, jobs=1, records=records)
    lines = [json.loads(line)["name"] for line in records.path.read_text().splitlines()]
    assert sorted(lines) == sorted(ALL)
    run_comparison(study, records=records)
    assert len(records.path.read_text().splitlines()) == len(ALL)


def test_what_was_made_from_another_full_model_is_made_again(make, worker, tmp_path):
    records = Records(tmp_path / "records.jsonl")
    run_comparison(make(), only="main", jobs=1, records=records)
    worker(full="b")  # another start, or a machine that rounds otherwise
    there = make(output=str(tmp_path / "there"))
    ran = run_comparison(there, jobs=1, records=records)
    # seed 1, of which all is recorded, stays as it is
    assert ran.done == ["sst2/seed-0/full", *FIRST, "sst2/seed-0/other", "sst2/seed-0/unhealed"]
    assert run_comparison(there, jobs=1, records=records).done == []


START = {"task": {"name": "sst2"}, "start": "base", "steps": 9}


@pytest.mark.parametrize("start", [None, START])
def test_a_comparison_of_which_all_is_recorded_makes_no_weights(make, worker, tmp_path, start):
    records = Records(tmp_path / "records.jsonl")
    if start is not None:
        make(start=start, tasks__sst2__before={"task": {"name": "sst2"}, "steps": 3})
    ran = run_comparison(make(), jobs=1, records=records).done
    assert ran[:2] == (["start", "sst2/before"] if start else ALL[:2])
    there = make(output=str(tmp_path / "there"))
    before = len(worker())
    assert run_comparison(there, records=records).done == [] and len(worker()) == before
    assert {row["state"] for row in listing(there)} == {"done"}


def test_a_start_is_made_for_those_alone_that_begin_with_it(make, worker, tmp_path):
    records = Records(tmp_path / "records.jsonl")
    make(start=START)
    run_comparison(make(), jobs=1, records=records)
    there = make(output=str(tmp_path / "there"), variants__added={"base": "m-smoe", "heal": None})
    there = make(parts__added={"variants": ["added"], "tasks": ["sst2"], "seeds": [0]})
    assert next(row["state"] for row in listing(there) if row["job"] == "start") == "not begun"
    ran = run_comparison(there, jobs=1, records=records)
    assert ran.done == ["start", "sst2/seed-0/full", "sst2/seed-0/added"]


def test_a_full_model_that_has_not_learnt_its_task_is_said_to_be_none(make, worker):
    study = make()
    run_comparison(study, only="main")
    assert worker()
    table = results(study, "main")["tables"][0]
    assert table["gate"]["rule"] == "majority of training" and not table["gate"]["is_passed"]
    assert "**full stands +0 standard errors from" in report(results(study, "main"))


@pytest.mark.parametrize(("hits", "is_passed"), [(-5, False), (0, False), (5, True)])
def test_a_full_model_that_answers_all_alike_is_held_against_rules_too(
    make, worker, hits, is_passed
):
    worker(hits={"full": hits}, error=0.0)
    study = make()
    run_comparison(study, only="main")
    found = results(study, "main")
    assert found["tables"][0]["gate"]["is_passed"] is is_passed
    above = f"{hits / 10:+.4f}".replace("-", "−")
    assert f"full stands {above}, of no known standard error, from" in report(found)
    assert ("has not learnt" not in report(found)) is is_passed


def test_three_standard_errors_above_what_needs_no_model_are_enough(make, worker):
    worker(hits={"full": 3})  # 0.8 ± 0.1, and the majority is 0.5
    study = make()
    run_comparison(study, only="main")
    gate = results(study, "main")["tables"][0]["gate"]
    assert gate["standard_errors"] == pytest.approx(3) and gate["is_passed"]
    said = report(results(study, "main"))
    assert "\nfull stands +3 standard errors from the best rule without a model" in said


def test_text_that_only_later_jobs_read_is_missed_before_anything_runs(make, worker, tmp_path):
    text = {"train": ["python:train"], "choose": ["nowhere/a.txt"], "report": ["python:held-out"]}
    study = make(
        tasks={"prose": {"text": text}},
        calibration={"num_tokens": 100},
        parts={"main": {"variants": ["m-smoe"], "tasks": ["prose"], "seeds": [0]}},
    )
    with pytest.raises(CalibrationError, match=r"nowhere/a.txt: there is no such text"):
        run_comparison(study)
    assert not worker() and not (tmp_path / "compared").exists()
