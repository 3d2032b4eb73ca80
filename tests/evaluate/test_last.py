"""The last checkpoints of a run: which they are, and how figures vary over them."""

import shutil
import statistics

import pytest

from commands import make_source
from commands import smelt as run_smelt
from smelt.errors import CheckpointError
from smelt.evaluate.last import last_checkpoints


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 9, 10 and 100."""
    folder = make_source(tmp_path / "run")
    for seed, step in enumerate((9, 10, 100)):
        made = make_source(tmp_path / f"made-{seed}", seed=seed)
        home = folder / "smelt" / "checkpoints" / f"step-{step}"
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, home)
    (folder / "smelt" / "checkpoints" / "step-110").mkdir()  # begun, not written
    return folder


def test_the_last_are_those_of_the_highest_steps_in_order(run):
    assert [path.name for path in last_checkpoints(run, 2)] == ["step-10", "step-100"]
    assert len(last_checkpoints(run, 3)) == 3


def test_more_than_there_are_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="holds 3 checkpoints .* the last 4 are asked"):
        last_checkpoints(run, 4)
    with pytest.raises(CheckpointError, match="holds 0 checkpoints"):
        last_checkpoints(tmp_path, 1)


def test_a_figure_over_the_last_checkpoints_has_mean_spread_and_range(run, write):
    item = {"premise": "It", "choice1": "a", "choice2": "b c", "question": "cause", "label": 0}
    write("copa", [item | {"premise": f"It is {i}", "choice2": f"b {i}"} for i in range(9)])
    said = run_smelt("evaluate", run, "--last", 3, "--tasks", "copa", "--json")
    assert said.code == 0, said.err
    values = [one["value"] for one in said.json["results"]]
    (row,) = said.json["spreads"]
    assert len(values) == row["checkpoints"] == 3 and row["run"] == str(run)
    assert row["mean"] == pytest.approx(statistics.fmean(values))
    assert row["sd"] == pytest.approx(statistics.stdev(values))
    assert (row["lowest"], row["highest"]) == (min(values), max(values))
    assert run_smelt("evaluate", run, "--last", 5, "--tasks", "copa").code == 2
