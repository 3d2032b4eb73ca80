"""What is there is never overwritten or lost: outputs, full disks, statistics, plans, signals."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bad_input.spoiling import compress, refused
from commands import QUICK, contents, smelt
from smelt.checkpoint import shards, sink

# --- the output ----------------------------------------------------------------------------------


def test_an_output_that_exists_is_left_alone(good, text):
    (good.parent / "out").mkdir()
    (good.parent / "out" / "mine.txt").write_text("mine")
    refused(compress(good, text), "exists", "overwrites nothing")
    assert (good.parent / "out" / "mine.txt").read_text() == "mine"


def test_an_output_inside_the_source(good, text):
    done = smelt("compress", good, good / "inside", "--keep", 0.5, "--text", text)
    refused(done, "inside the source")
    assert not (good / "inside").exists()
    refused(smelt("compress", good, good, "--keep", 0.5), "inside the source")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written(good, text):
    closed = good.parent / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    done = smelt("compress", good, closed / "out", "--keep", 0.5, "--text", text)
    closed.chmod(0o700)
    refused(done, "cannot be written")
    assert not any(closed.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("compress", "SRC", "OUT", "--keep", 0.5),
        ("calibrate", "SRC", "OUT"),
        ("plan", "SRC", "--stats", "STATS", "--keep", 0.5, "-o", "OUT"),
        ("evaluate", "SRC", "-o", "OUT"),
        ("evaluate", "SRC", "--tasks", "blimp", "--items", "OUT"),
        ("evaluate", "SRC", "--benchmarks", "sst2", "--outcomes", "OUT"),
        ("bench", "SRC", "-o", "OUT"),
        ("report", "PLAN", "-o", "OUT"),
        ("report", "PLAN", "-o", "OUT", "--markdown"),
        ("export", "SRC", "OUT.gguf"),
        ("inspect", "SRC", "--stable-rank", "--figure", "OUT.svg"),
        ("analyse", "SRC", "--out", "OUT"),
        ("heal", "SRC", "--teacher", "SRC", "-o", "OUT", "--text", "TEXT", "-q"),
        ("demo", "-o", "OUT"),
    ],
    ids=lambda words: " ".join(str(word) for word in words[:4]),
)
def test_an_output_beneath_a_file_is_refused_before_anything_is_done(
    ground, good, text, words, monkeypatch
):
    def work(*_, **__):
        raise AssertionError("it began to work")

    for name in (
        "compress.pipeline.run_calibration",
        "compress.pipeline.run_plan",
        "checkpoint.walk.Walk.__init__",
        "api.evaluate",
        "api.measuring.run_bench",
        "report.make.read_material",
        "export.gguf_file.list_parts",
    ):
        monkeypatch.setattr(f"smelt.{name}", work)
    (good.parent / "file").touch()
    places = {"SRC": good, "TEXT": text, "STATS": ground / "stats", "PLAN": ground / "p.json"}
    places |= {f"OUT{end}": good.parent / "file" / f"out{end}" for end in ("", ".gguf", ".svg")}
    refused(smelt(*(places.get(word, word) for word in words)), "cannot be written", "file")


def test_too_little_space_is_seen_before_writing(good, text, monkeypatch):
    monkeypatch.setattr(
        sink.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    refused(compress(good, text), "free", "the output needs")


@pytest.mark.parametrize("stats_too", [False, True])
def test_a_disk_that_fills_up_keeps_what_is_done(good, text, monkeypatch, stats_too):
    write = shards.write_shard

    def full(file: Path, tensors: Any) -> str:
        if stats_too or file.name.startswith("model-00002"):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return write(file, tensors)

    monkeypatch.setattr(sink, "write_shard", full)
    monkeypatch.setattr("smelt.compress.calibrate.write_shard", full)
    refused(compress(good, text), "No space left")
    monkeypatch.undo()
    assert compress(good, text).code == 0  # the same command goes on


# --- statistics and plans ------------------------------------------------------------------------


def test_statistics_of_another_checkpoint(ground, other, text):
    refused(compress(other, text, "--stats", ground / "stats"), "another", "calibrate")
    done = smelt("plan", other, "--stats", ground / "stats", "--keep", 0.5)
    refused(done, "statistics are of checkpoint")


def test_a_plan_of_another_checkpoint(ground, other):
    done = smelt("apply", other, ground / "p.json", other.parent / "out")
    refused(done, "the plan is of checkpoint")
    assert not (other.parent / "out").exists()


def test_statistics_that_are_none(good, text, tmp_path):
    refused(compress(good, text, "--stats", tmp_path / "nothing"), "no statistics there")


def test_statistics_that_are_damaged(ground, good, text, tmp_path):
    stats = Path(shutil.copytree(ground / "stats", tmp_path / "stats"))
    file = stats / "layer-000.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    refused(compress(good, text, "--stats", stats), "statistics cannot be read")


def test_a_plan_that_is_damaged(ground, good, tmp_path):
    plan = tmp_path / "p.json"
    plan.write_text((ground / "p.json").read_text()[:-200])
    refused(smelt("apply", good, plan, tmp_path / "out"), "p.json")
    refused(smelt("apply", good, tmp_path / "none.json", tmp_path / "out"), "no such plan")


# --- signals -------------------------------------------------------------------------------------

SLOW = """
import sys, time
from smelt.checkpoint import sink
write = sink.write_shard
def slow(file, tensors):
    time.sleep(0.4)
    return write(file, tensors)
sink.write_shard = slow
from smelt.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_to_the_same_bytes(good, text, tmp_path, monkeypatch, sent):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    words = ["compress", str(good), "out", "--keep", "0.5", "--text", str(text), *QUICK]
    monkeypatch.chdir(tmp_path / "a")
    assert smelt(*words).code == 0
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words],
        cwd=tmp_path / "b",
        env={
            **os.environ,
            "PYTHONPATH": str(Path(sink.__file__).parents[2]),
        },  # what is tested here
        stderr=subprocess.PIPE,
        text=True,
    )
    staging = tmp_path / "b" / "out.partial"
    begin = time.monotonic()
    while not list(staging.glob("*.safetensors")) and time.monotonic() - begin < 300:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    run.send_signal(sent)
    _, err = run.communicate(timeout=300)
    assert not (tmp_path / "b" / "out").exists()
    assert staging.is_dir()
    if sent == signal.SIGKILL:
        assert run.returncode == -sent
    else:
        assert run.returncode == 128 + sent
        assert "Traceback" not in err
        assert f"stopped by {sent.name}" in err and "out.partial" in err
    monkeypatch.chdir(tmp_path / "b")
    assert smelt(*words).code == 0
    assert contents(tmp_path / "b" / "out") == contents(tmp_path / "a" / "out")


def test_a_folder_of_another_unfinished_run_is_refused(good, text, monkeypatch):
    def full(file: Path, tensors: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(sink, "write_shard", full)
        refused(compress(good, text), "No space left")
    refused(compress(good, text, "--keep", 0.75), "another unfinished compression")
