"""Laws of records: what is finished on one machine is finished on the next."""

import gzip
from pathlib import Path

import pytest

from commands import smelt
from smelt.errors import RecipeError
from smelt.study.cells import cells
from smelt.study.records import Records
from smelt.study.runner import run_study
from smelt.study.store import Store
from smelt.study.tables import results


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
def test_a_study_goes_on_elsewhere_from_its_records(make, worker, tmp_path, name):
    whole = make(evaluation={"tasks": ["blimp"]})
    run_study(whole)
    calls = worker()

    records = Records(tmp_path / name)
    here = make(output=str(tmp_path / "here"))
    run_study(here, only="core", records=records)
    there = make(output=str(tmp_path / "there"))
    ran = run_study(there, records=records)
    assert all("size/" in one for one in ran.done)
    assert sorted(worker()[len(calls) :]) == sorted(calls)
    assert results(there) == results(whole)


def test_a_second_restoring_changes_nothing(make, worker, tmp_path):
    study, records = make(), Records(tmp_path / "records.jsonl")
    run_study(study, records=records)
    assert worker()
    elsewhere = Store(tmp_path / "elsewhere")
    assert len(records.restore(elsewhere)) == 6 + 7
    assert records.restore(elsewhere) == []


def test_what_was_done_without_the_file_is_added_to_it(make, worker, tmp_path):
    study, records = make(), Records(tmp_path / "records.jsonl")
    run_study(study, only="core")
    assert worker()
    run_study(study, records=records)
    assert len(records.restore(Store(tmp_path / "elsewhere"))) == 6 + 7
    lines = records.path.read_text()
    run_study(study, records=records)
    assert records.path.read_text() == lines  # of the same figures no second line


def test_a_run_on_its_way_is_not_taken_from_the_records(make, worker, tmp_path):
    study, records = make(), Records(tmp_path / "records.jsonl")
    run_study(study, only="core", records=records)
    assert worker()
    elsewhere = Store(tmp_path / "elsewhere")
    elsewhere.run("core/samoe/seed-0.partial").mkdir(parents=True)
    assert "core/samoe/seed-0" not in records.restore(elsewhere)


def test_the_last_record_of_a_run_holds(make, worker, tmp_path):
    study, records = make(), Records(tmp_path / "records.jsonl")
    run_study(study, only="core", records=records)
    assert worker()
    store = Store(study.output)
    path = store.run("core/samoe/seed-0") / "smelt" / "training.json"
    path.write_text(path.read_text().replace('"parameters": 1000', '"parameters": 2000'))
    records.keep(store, "core/samoe/seed-0")
    elsewhere = Store(tmp_path / "elsewhere")
    records.restore(elsewhere)
    training = elsewhere.training("core/samoe/seed-0")
    assert training is not None and training["parameters"] == 2000


def test_a_run_that_more_is_asked_of_than_was_recorded_is_trained_again(make, worker, tmp_path):
    records = Records(tmp_path / "records.jsonl")
    run_study(make(), only="core", records=records)
    before = len(worker())
    more = make(output=str(tmp_path / "there"), evaluation={"tasks": ["blimp"]})
    run_study(more, only="core", records=records)
    kinds = [call.split()[0] for call in worker()[before:]]
    assert sorted(kinds) == ["evaluate"] * 4 + ["train"] * 4  # and no trial


def test_a_record_made_with_other_settings_is_refused(make, worker, tmp_path):
    records = Records(tmp_path / "records.jsonl")
    run_study(make(), only="core", records=records)
    assert worker()
    other = make(output=str(tmp_path / "there"), base__weight_decay=0.2)
    with pytest.raises(RecipeError, match=r"weight_decay = 0\.1, the study says 0\.2"):
        run_study(other, records=records)


def test_what_is_no_record_is_named_with_its_line(make, worker, tmp_path):
    records = Records(tmp_path / "records.jsonl")
    run_study(make(), only="core", records=records)
    assert worker()
    with records.path.open("a") as file:
        file.write('{"name": "core/samoe/seed-9"}\n')
    with pytest.raises(RecipeError, match=r"records\.jsonl: what follows line 10 is no record"):
        records.restore(Store(tmp_path / "elsewhere"))


@pytest.mark.parametrize("where", ["", "file/records.jsonl", "file/more/records.jsonl"])
def test_what_cannot_be_written_is_refused_before_anything_runs(make, worker, tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"can(not)? be written"):
        run_study(make(), records=Records(tmp_path / where))
    assert worker() == []


def test_a_folder_holds_no_records(tmp_path):
    with pytest.raises(RecipeError, match="is a folder"):
        Records(tmp_path).restore(Store(tmp_path / "elsewhere"))


def test_a_cut_packed_file_is_named(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"name": "a", "files": {}}\n')[:-9])
    with pytest.raises(RecipeError, match="what follows line 0 is no record"):
        Records(path).restore(Store(tmp_path / "elsewhere"))


def test_tables_are_shown_from_records_alone(make, worker, tmp_path):
    from smelt.settings import dump_recipe

    study, path = make(), tmp_path / "records.jsonl"
    run_study(study, records=Records(path))
    assert worker()
    there = make(output=str(tmp_path / "there"))
    dump_recipe(there, tmp_path / "study.yaml")
    said = smelt("study", tmp_path / "study.yaml", "--table", "--records", path).out
    assert "core/samoe" in said and "Unfinished" not in said
    assert not list(Path(there.output).rglob("*.safetensors"))


def test_tables_show_a_run_that_more_is_asked_of_than_was_recorded(make, worker, tmp_path):
    from smelt.settings import dump_recipe

    path = tmp_path / "records.jsonl"
    run_study(make(), records=Records(path))
    assert worker()
    shown = [row["row"] for row in results(make())["rows"]]
    more = make(output=str(tmp_path / "there"), evaluation={"tasks": ["blimp"]})
    dump_recipe(more, tmp_path / "study.yaml")
    said = smelt("study", tmp_path / "study.yaml", "--table", "--records", path, "--json").json
    assert shown and [row["row"] for row in said["rows"]] == shown
    again = "not evaluated: blimp; again: its weights are gone"
    assert said["unfinished"] == dict.fromkeys((cell.id for cell in cells(more)), again)


def test_from_python_a_study_is_one_call(values, worker, tmp_path):
    import yaml

    from smelt import api

    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    found = api.study(path, ["parts.core.seeds=[0]"], only="core", records=tmp_path / "r.jsonl")
    assert [row["row"] for row in found["rows"]] == ["core/ar-moe", "core/samoe"]
    assert found["failed"] == {} and found["unfinished"] == {} and len(worker()) == 6 + 2
    worker(fail=["samoe/seed-1"])
    found = api.study(path, only="core")
    assert found["failed"] == {"core/samoe/seed-1 (train)": "as it was told"}
