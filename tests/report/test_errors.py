"""Bad input: one message, exit code 2, and nothing is written."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import Outcome, smelt
from smelt.evaluate.item_files import Answers, save_answers
from smelt.evaluate.results import Result


def refused(done: Outcome, *parts: str) -> None:
    """Exit code 2 and one line on stderr, which says all of these."""
    lines = [line for line in done.err.splitlines() if not line.startswith("smelt: warning")]
    assert done.code == 2 and not done.out, (done.code, done.out, done.err)
    assert len(lines) == 1 and lines[0].startswith("smelt: error: "), done.err
    for part in parts:
        assert part.lower() in lines[0].lower(), (part, lines[0])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def test_a_folder_whose_plan_is_gone_is_refused(ground: Any, tmp_path: Path, out: Path) -> None:
    folder = Path(shutil.copytree(ground.dropped, tmp_path / "spoilt"))
    (folder / "smelt" / "plan.json").unlink()
    refused(smelt("report", folder, "-o", out), "plan.json is missing")
    shutil.rmtree(folder / "smelt")
    refused(smelt("report", folder, "-o", out), "smelt did not make it")
    assert not out.exists()


def test_an_edited_plan_is_refused(ground: Any, tmp_path: Path, out: Path) -> None:
    plan = json.loads((ground.dropped / "smelt" / "plan.json").read_text())
    plan["layers"][0]["labels"][0] = 77
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    refused(smelt("report", tmp_path / "plan.json", "-o", out), "edited")


def test_an_edited_results_file_is_refused(ground: Any, tmp_path: Path, out: Path) -> None:
    text = ground.results.read_text().replace('"value": 1.2', '"value": 1.1')
    (tmp_path / "r.json").write_text(text)
    done = smelt("report", ground.merged, "--results", tmp_path / "r.json", "-o", out)
    refused(done, "r.json", "edited")


def test_a_record_that_cannot_be_is_refused(ground: Any, tmp_path: Path, out: Path) -> None:
    value = json.loads(ground.results.read_text())
    value.pop("sha256")  # as older files
    value["results"][0]["n"] = -3
    (tmp_path / "r.json").write_text(json.dumps(value))
    done = smelt("report", ground.merged, "--results", tmp_path / "r.json", "-o", out)
    refused(done, "r.json", "n = -3 cannot be")


def test_missing_files_and_files_of_another_kind_are_refused(
    ground: Any, tmp_path: Path, out: Path
) -> None:
    refused(smelt("report", tmp_path / "no", "-o", out), "no such file")
    refused(smelt("report", ground.merged, "--results", ground.bench, "-o", out), "no results")
    refused(smelt("report", ground.merged, "--bench", ground.results, "-o", out), "no benchmark")
    (tmp_path / "list.json").write_text("[1]")
    refused(smelt("report", tmp_path / "list.json", "-o", out), "none of what")
    (tmp_path / "cut.json").write_text('{"results": [')
    refused(smelt("report", tmp_path / "cut.json", "-o", out), "no JSON")
    weights = next(ground.merged.glob("*.safetensors"))
    refused(smelt("report", weights, "-o", out), "no JSON")
    (tmp_path / "empty").mkdir()
    refused(smelt("report", tmp_path / "empty", "-o", out), "none of what")


def test_items_without_the_results_they_belong_to_are_refused(tmp_path: Path, out: Path) -> None:
    items = tmp_path / "items.json"
    save_answers([Answers("other", "f" * 64, "float32", "cpu", ())], items)
    refused(smelt("report", items, "-o", out), "items of other", "evaluate -o")
    refused(smelt("report", "--results", items, "-o", out), "no results")
    items.write_text(items.read_text().replace('"other"', '"edited"'))
    refused(smelt("report", items, "-o", out), "items.json")


def test_a_folder_that_is_not_finished_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    refused(smelt("report", tmp_path / "run.partial", "-o", out), "not finished")


def test_a_bench_file_of_another_version_or_edited_is_refused(
    ground: Any, make_bench: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    old = make_bench(tmp_path / "old.json", ground.fingerprints, version=1)
    refused(smelt("report", old, "-o", out), "version 1")
    odd = make_bench(tmp_path / "odd.json", ground.fingerprints, decode=[{"batch": "many"}])
    refused(smelt("report", odd, "-o", out), "odd.json", "decode.0")


def test_measurements_of_other_checkpoints_alone_are_refused(
    ground: Any,
    make_result: Callable[..., Result],
    results_file: Callable[..., Path],
    out: Path,
) -> None:
    strange = results_file(make_result("9" * 64, checkpoint="stranger"))
    done = smelt("report", ground.merged, "--results", strange, "-o", out)
    refused(done, "none of the measurements", "stranger")
    assert smelt("report", "--results", strange, "-o", out).code == 0  # alone they may be


def test_one_stranger_among_the_measured_is_marked(
    ground: Any,
    make_result: Callable[..., Result],
    results_file: Callable[..., Path],
    out: Path,
) -> None:
    strange = results_file(make_result("9" * 64, checkpoint="stranger"))
    files = ("--results", strange, "--results", ground.results)
    assert smelt("report", ground.merged, *files, "-o", out).code == 0
    assert "stranger *" in out.read_text(encoding="utf-8")


def test_different_settings_in_one_table_are_refused(
    ground: Any,
    make_result: Callable[..., Result],
    results_file: Callable[..., Path],
    out: Path,
) -> None:
    marks = ground.fingerprints
    one = make_result(marks["merged"], task="piqa", metric="acc", text_sha256="1" * 64)
    two = make_result(marks["dropped"], task="piqa", metric="acc", text_sha256="2" * 64)
    done = smelt("report", ground.merged, "--results", results_file(one, two), "-o", out)
    refused(done, "piqa, acc", "measured differently")


def test_what_exists_is_not_overwritten(ground: Any, out: Path) -> None:
    out.write_text("mine")
    refused(smelt("report", ground.merged, "-o", out), "exists")
    refused(smelt("report", ground.merged, "--markdown", "-o", out), "exists")
    assert out.read_text() == "mine"


def test_what_is_asked_for_has_to_be_said(ground: Any, out: Path) -> None:
    refused(smelt("report", "-o", out), "name what to report")
    refused(smelt("report", ground.merged), "-o report.html")
    refused(smelt("report", ground.merged, ground.merged, "-o", out), "twice")
    refused(smelt("report", ground.merged, "--markdown", "--card"), "one at a time")


def test_without_plotly_the_message_says_what_to_install(
    ground: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smelt.report.page import plotly_bundle

    plotly_bundle.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    refused(smelt("report", ground.merged, "-o", out), "pip install 'smelt[report]'")
    monkeypatch.undo()
    plotly_bundle.cache_clear()
    assert not out.exists()


def test_the_markdown_table_needs_no_plotly(ground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    files = ("--results", ground.results, "--bench", ground.bench)
    done = smelt("report", ground.merged, "--markdown", *files)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("| checkpoint") and len(lines) == 5
    assert "1.200 ± 0.050" in done.out and "source (original)" in done.out
    refused(smelt("report", ground.analysis, "--markdown"), "nothing measured")
