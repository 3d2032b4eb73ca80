"""`smelt train`: what it prints, its exit codes, and what a signal leaves behind."""

import json
import os
import signal

import pytest
import yaml

from smelt.cli import main
from smelt.train import step
from smelt.train.measure import forward


@pytest.fixture
def command(samoe, tmp_path, capsys):
    """The exit code, stdout and stderr of a run, some of its settings changed."""

    def call(*options, **changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**samoe, **changes}))
        code = main(["train", str(path), *options])
        return code, *capsys.readouterr()

    return call


def test_several_seeds_are_told_as_mean_and_deviation(command, tmp_path):
    code, out, _ = command(seeds=[0, 1], steps=2)
    assert code == 0
    assert "each of 2 seeds" in out and "sd over seeds" in out
    code, out, _ = command("--json", seeds=[0, 1], steps=2)  # both are done
    assert code == 0
    found = json.loads(out)
    assert found["seeds"] == [0, 1]
    assert found["held_out"] == json.loads((tmp_path / "out/summary.json").read_text())["held_out"]


def test_a_run_that_diverges_is_one_line_and_code_2(command, monkeypatch):
    def breaking(model, inputs):
        outputs = forward(model, inputs)
        outputs.logits.mul_(float("nan"))
        return outputs

    monkeypatch.setattr(step, "forward", breaking)
    code, _, err = command("--quiet")
    assert code == 2
    assert err.startswith("smelt: error: Training stopped at step 1: the loss is nan")
    assert "Traceback" not in err


def test_a_signal_leaves_the_run_to_go_on_with(command, monkeypatch, tmp_path):
    calls = []

    def stopping(model, inputs):
        calls.append(model.training)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(model, inputs)

    monkeypatch.setattr(step, "forward", stopping)
    code, _, err = command("--quiet")
    assert code == 128 + signal.SIGTERM
    assert f"kept in {tmp_path / 'out.partial'}" in err
    code, _, _ = command("--quiet")
    assert code == 0
    assert len(calls) == 5 + 5  # steps 4 to 8
