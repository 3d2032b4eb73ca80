"""Differences on the same items: laws of the paired bootstrap, files of outcomes, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest

from commands import make_source
from commands import smelt as run_smelt
from smelt.errors import SmeltError
from smelt.evaluate.bootstrap import paired_differences
from smelt.evaluate.item_files import Answers, load_answers, save_answers
from smelt.evaluate.outcomes import Outcome
from smelt.evaluate.paired import compare_answers


def outcome(values, task="copa", metric="acc", aggregate="mean", **changes):
    columns = np.asarray(values, dtype=float).reshape(len(values), -1)
    settings = {"lm_eval": "0.4.13", "shots": 0, "prompts": "a" * 64}
    given = {
        "task": task,
        "metric": metric,
        "aggregate": aggregate,
        "columns": columns,
        "names": tuple(map(str, range(len(values)))),
        "source": f"{task}/validation",
        "sha256": "b" * 64,
        "harness": settings,
    }
    return Outcome(**given | changes)


def answers(name, *outcomes):
    return Answers(name, name * 2, "float32", "cpu", outcomes)


def coins(size, share, seed):
    return (np.random.default_rng(seed).random(size) < share).astype(float)


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("aggregate", "width"), [("mean", 1), ("F1", 3), ("bits", 2)])
def test_a_model_differs_from_itself_by_nothing(aggregate, width):
    columns = np.random.default_rng(0).random((40, width))
    (found,) = paired_differences([aggregate], [columns], [columns.copy()], resamples=200)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_swapping_the_two_negates_the_difference():
    ours, theirs = coins(300, 0.6, 1)[:, None], coins(300, 0.5, 2)[:, None]
    (one,), (other,) = (
        paired_differences(["mean"], [a], [b], resamples=1000)
        for a, b in ((ours, theirs), (theirs, ours))
    )
    assert one.mean == -other.mean and one.p == other.p
    assert [one.low, one.high] == pytest.approx([-other.high, -other.low])


def test_the_interval_of_many_items_is_the_analytic_one():
    ours, theirs = coins(5000, 0.6, 1), coins(5000, 0.58, 2)
    gap = ours - theirs
    error = gap.std(ddof=1) / len(gap) ** 0.5
    (found,) = paired_differences(["mean"], [ours[:, None]], [theirs[:, None]], resamples=4000)
    assert found.mean == pytest.approx(gap.mean())
    assert found.low == pytest.approx(gap.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(gap.mean() + 1.96 * error, abs=0.1 * error)


def test_pairing_takes_out_what_is_hard_for_both():
    hard = coins(2000, 0.5, 3)
    better = np.maximum(hard, coins(2000, 0.04, 4))
    (paired,) = paired_differences(["mean"], [better[:, None]], [hard[:, None]], resamples=1000)
    moved = np.roll(better, 1)[:, None]
    (apart,) = paired_differences(["mean"], [moved], [hard[:, None]], resamples=1000)
    assert paired.mean == pytest.approx(apart.mean)
    assert paired.high - paired.low < (apart.high - apart.low) / 3
    assert paired.p < 0.01 < apart.p


def test_a_difference_that_is_not_there_is_found_as_seldom_as_the_level_says():
    draws = np.random.default_rng(0)
    found = [
        paired_differences(
            ["mean"], [draws.random((200, 1))], [draws.random((200, 1))], seed=i, resamples=400
        )[0].p
        for i in range(200)
    ]
    share = float(np.mean(np.array(found) < 0.05))
    assert share < 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
    assert np.mean(np.array(found) < 0.5) == pytest.approx(0.5, abs=0.12)


def test_metrics_of_one_task_are_resampled_together():
    columns = [coins(50, 0.5, i)[:, None] for i in range(2)]
    alone = [
        paired_differences(["mean"], [columns[i]], [columns[1 - i]], resamples=100)[0]
        for i in range(2)
    ]
    both = paired_differences(["mean"] * 2, columns, columns[::-1], resamples=100)
    assert both == alone


# --- files ---------------------------------------------------------------------------------------


def test_outcomes_in_a_file_compare_as_those_in_memory(tmp_path):
    ours = answers("b", outcome(coins(30, 0.7, 1)), outcome([[-3.0, 2], [-4, 5]], "x", "y", "bits"))
    theirs = answers(
        "a", outcome(coins(30, 0.4, 2)), outcome([[-2.0, 2], [-9, 5]], "x", "y", "bits")
    )
    save_answers([theirs], tmp_path / "a.json")
    save_answers([ours], tmp_path / "b.json")
    read = load_answers(tmp_path / "a.json") + load_answers(tmp_path / "b.json")
    found = compare_answers(read, resamples=300)
    assert found == compare_answers([theirs, ours], resamples=300)
    assert [(one.checkpoint, one.against, one.task) for one in found] == [
        ("b", "a", "copa"),
        ("b", "a", "x"),
    ]


def test_an_edited_file_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    save_answers([answers("a", outcome([1, 0]))], path)
    value = json.loads(path.read_text())
    value["items"][0]["outcomes"][0]["columns"][1] = [1.0]
    path.write_text(json.dumps(value))
    with pytest.raises(SmeltError, match=r"a\.json: was edited after it was measured"):
        load_answers(path)


SETTINGS = {"lm_eval": "0.4.13", "shots": 0, "prompts": "a" * 64}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "c" * 64}, r"the items \(by SHA-256\) bbbbbbbb… and cccccccc…"),
        ({"harness": SETTINGS | {"shots": 5}}, "solved examples 0 and 5"),
        ({"harness": SETTINGS | {"prompts": "d" * 64}}, r"the prompts \(by SHA-256\)"),
        ({"harness": SETTINGS | {"lm_eval": "0.5"}}, "lm-evaluation-harness 0.4.13 and 0.5"),
        ({"metric": "acc_norm"}, r"metrics differ \(copa acc, copa acc_norm\)"),
        ({"names": ("x", "y")}, "units have other names"),
    ],
)
def test_what_was_not_asked_alike_is_refused(changes, words):
    one = outcome([1, 0])
    with pytest.raises(SmeltError, match=words):
        compare_answers([answers("a", one), answers("b", replace(one, **changes))])


def test_one_checkpoint_is_compared_with_nothing():
    with pytest.raises(SmeltError, match="1 checkpoint has nothing to be compared with"):
        compare_answers([answers("a", outcome([1, 0]))])


# --- the command line ----------------------------------------------------------------------------


def test_evaluate_compares_and_saves_what_compare_reads(write, tmp_path):
    item = {"premise": "It", "choice1": "a", "choice2": "b c", "question": "cause", "label": 0}
    write("copa", [item | {"premise": f"It is {i}"} for i in range(12)])
    a, b = (make_source(tmp_path / name / "x", seed=i) for i, name in enumerate("ab"))
    files = [tmp_path / f"{name}.items.json" for name in ("both", "a", "b")]
    asked = ("--tasks", "copa", "--items")
    said = run_smelt("evaluate", a, b, *asked, files[0], "--compare", "--json")
    assert said.code == 0, said.err
    (row,) = said.json["differences"]
    values = [one["value"] for one in said.json["results"]]
    assert row["difference"] == pytest.approx(values[1] - values[0])
    for folder, file in ((a, files[1]), (b, files[2])):
        assert run_smelt("evaluate", folder, *asked, file, "--quiet").code == 0
    later = run_smelt("compare", files[1], files[2], "--json")
    assert later.code == 0, later.err
    figures = [
        {key: value for key, value in one.items() if key not in ("checkpoint", "less")}
        for one in (row, later.json["differences"][0])
    ]
    assert figures[0] == figures[1]
    table = run_smelt("compare", files[0]).out
    assert "95 % low" in table and "copa" in table


def test_results_of_other_settings_are_kept_out_of_one_table(write, tmp_path):
    item = {"premise": "It", "choice1": "a", "choice2": "b c", "question": "cause", "label": 0}
    write("copa", [item | {"premise": f"It is {i}"} for i in range(6)])
    write("copa", [item], "train")
    source = make_source(tmp_path / "x")
    for name, more in (("a", ()), ("b", ()), ("few", ("--shots", 1)), ("part", ("--limit", 3))):
        said = run_smelt("evaluate", source, "--tasks", "copa", *more, "-o", tmp_path / name)
        assert said.code == 0, said.err
    same = run_smelt("compare", tmp_path / "a", tmp_path / "b")
    assert same.code == 0 and "acc" in same.out, same.err
    said = run_smelt("compare", tmp_path / "a", tmp_path / "few")
    assert said.code == 2 and "solved examples 0 and 1" in said.err
    said = run_smelt("compare", tmp_path / "a", tmp_path / "part")
    assert said.code == 2 and "the items (by SHA-256)" in said.err
    value = json.loads((tmp_path / "a").read_text())
    value["results"][0]["value"] = 0.25
    (tmp_path / "a").write_text(json.dumps(value))
    said = run_smelt("compare", tmp_path / "a", tmp_path / "b")
    assert said.code == 2 and "was edited" in said.err and said.err.count("\n") == 1
