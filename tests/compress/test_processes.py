"""Laws of a compression in several processes: it is that of one, its tokens shared out."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from commands import make_source, smelt
from smelt.compress.calibrate import RoutingStats
from smelt.compress.plan import Plan

TARGETS = ("sequential", "corrected")
SIZES = ["sequence_length=32", "batch_size=4"]
FITS = [
    "--keep=0.5",
    "--reconstruct",
    "--set=reconstruct.steps=12",
    "--set=reconstruct.batch_tokens=128",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every command once by this process, and once by two."""
    folder = tmp_path_factory.mktemp("processes")
    source = str(make_source(folder / "source"))
    text = [f"--text={folder / 'text.txt'}", "--tokens=2000"]
    of_text = [f"--set=calibration.{size}" for size in SIZES]
    for name, run in (("one", alone), ("two", in_two)):
        at = folder / name
        run("calibrate", source, at / "stats", *text, *(f"--set={size}" for size in SIZES))
        for target in TARGETS:
            also = ["--sequential"] if target == "sequential" else []
            how = [*text, *of_text, *FITS, *also, f"--set=reconstruct.target={target}"]
            run("compress", source, at / target, *how)
        run("compress", source, at / "plain", *text, *of_text, "--keep=0.5", "--no-reconstruct")
    return folder


def alone(*words):
    assert smelt(*words).code == 0


def in_two(*words):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "smelt"]
    ended = subprocess.run(
        [sys.executable, "-m", *torchrun, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


def test_the_statistics_of_two_processes_are_those_of_one(folder):
    one, two = (RoutingStats.load(folder / name / "stats") for name in ("one", "two"))
    assert one.num_tokens == two.num_tokens
    for name, layer in one.layers.items():
        for key, value in layer.tensors().items():
            other = two.layers[name].tensors()[key]
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_two_processes_fit_what_one_does_within_rounding(folder, target):
    one, two = (Plan.load(folder / n / target / "smelt" / "plan.json") for n in ("one", "two"))
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.labels == b.labels
        assert a.fit.tokens == b.fit.tokens
        assert b.fit.before == pytest.approx(a.fit.before, rel=1e-4)
        assert b.fit.after == pytest.approx(a.fit.after, rel=1e-3)
        assert a.fit.after < a.fit.before
    first, second = (
        load_file(next((folder / n / target).glob("model-00001*"))) for n in ("one", "two")
    )
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=2e-3, atol=2e-4)


def test_what_needs_no_tokens_is_written_by_one_of_them(folder):
    one, two = (folder / n / "plain" for n in ("one", "two"))
    for file in sorted(one.glob("*.safetensors")):
        assert file.read_bytes() == (two / file.name).read_bytes()
    assert not list((folder / "two").glob("*.partial"))
