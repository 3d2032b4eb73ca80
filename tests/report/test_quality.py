"""Records side by side: what may stand in one row, and what may not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from smelt.errors import RecipeError
from smelt.evaluate.item_files import Answers
from smelt.evaluate.outcomes import Outcome
from smelt.evaluate.results import Result
from smelt.report.quality import layer_records, measures, qualities

A, B = "a" * 64, "b" * 64
Make = Callable[..., Result]


def test_checkpoints_measured_alike_share_a_row(make_result: Make) -> None:
    (row,) = measures([make_result(A), make_result(B)])
    assert set(row.results) == {A, B}


def test_of_two_measurements_the_latest_counts(make_result: Make) -> None:
    later = make_result(A, value=2.0, time="2026-02-01T00:00:00+00:00")
    (row,) = measures([later, make_result(A)])
    assert row.results[A].value == 2.0


def test_checkpoints_measured_on_different_items_are_refused(make_result: Make) -> None:
    one = make_result(A, metric="nats per token")
    other = make_result(B, metric="nats per token", text_sha256="c" * 64, n=100)
    with pytest.raises(RecipeError, match="measured differently.*n = 500 against.*n = 100"):
        measures([one, other])


def test_a_checkpoint_measured_on_both_texts_makes_two_rows(make_result: Make) -> None:
    more = make_result(A, text_sha256="c" * 64, text=("other.txt",))
    assert len(measures([make_result(A), make_result(B), more])) == 2


def test_bits_per_byte_of_one_text_compare_whatever_the_tokens(make_result: Make) -> None:
    found = measures([make_result(A), make_result(B, text_sha256="c" * 64)])
    assert [set(row.results) for row in found] == [{A}, {B}]  # and each says its own n


def test_harness_settings_that_differ_are_refused_by_name(make_result: Make) -> None:
    def one(mark: str, shots: int) -> Result:
        return make_result(mark, task="piqa", metric="acc", harness={"shots": shots})

    assert len(measures([one(A, 0), one(B, 0)])) == 1
    with pytest.raises(RecipeError, match="harness settings: shots 0 against 5"):
        measures([one(A, 0), one(B, 5)])


def test_errors_of_layers_are_no_rows_of_the_table(make_result: Make) -> None:
    found = [make_result(A, task="fidelity", metric="output error of model.layers.3.mlp")]
    assert measures(found) == []
    assert layer_records(found, "output error") == {A: {"model.layers.3.mlp": 1.0}}


def test_the_error_of_a_mean_over_tasks_is_that_of_independent_means(make_result: Make) -> None:
    found = [
        make_result(A, task=task, metric="acc", value=value, standard_error=error, text=(task,))
        for task, value, error in (("piqa", 0.6, 0.03), ("copa", 0.8, 0.04))
    ]
    (quality,) = qualities(measures(found))
    assert quality.values[A] == (pytest.approx(0.7), pytest.approx(0.025))


def test_a_checkpoint_without_one_of_the_tasks_has_no_mean(make_result: Make) -> None:
    found = [make_result(A, task=task, metric="acc", text=(task,)) for task in ("piqa", "copa")]
    found.append(make_result(B, task="piqa", metric="acc", text=("piqa",)))
    (quality,) = qualities(measures(found))
    assert set(quality.values) == {A}


def answered(fingerprint: str, task: str, right: list[int], **changes: Any) -> Answers:
    names = tuple(map(str, range(len(right))))
    asked: dict[str, Any] = {"sha256": "a" * 64, "aggregate": "mean", "harness": {"shots": 0}}
    asked |= {"task": task, "metric": "acc", "source": task} | changes
    columns = np.array(right, dtype=np.float64)[:, None]
    one = Outcome(columns=columns, names=names, **asked)
    return Answers(fingerprint[:4], fingerprint, "float32", "cpu", (one,))


def test_accuracies_are_pairs_where_every_item_is_known(make_result: Make) -> None:
    tasks = {"piqa": [1, 0, 1, 1], "copa": [0, 1]}
    found = [
        make_result(mark, task=task, metric="acc", value=np.mean(right), harness={"shots": 0})
        for mark in (A, B)
        for task, right in tasks.items()
    ]
    told = [answered(A, task, right) for task, right in tasks.items()]
    (quality,) = qualities(measures(found), [*told, answered(B, "piqa", tasks["piqa"])])
    assert quality.parts == {A: ((0.125, 0, 0.125, 0.125), (0, 0.25))}  # of B one task is not told
    assert sum(map(sum, quality.parts[A])) == pytest.approx(quality.values[A][0])


@pytest.mark.parametrize(
    "changes", [{"sha256": "c" * 64}, {"harness": {"shots": 5}}, {"aggregate": "f1"}]
)
def test_items_of_another_setting_are_no_pairs(make_result: Make, changes: dict[str, str]) -> None:
    found = [make_result(A, task="piqa", metric="acc", value=0.75, harness={"shots": 0})]
    right = [1, 0, 1, 1]
    assert qualities(measures(found), [answered(A, "piqa", right)])[0].parts
    for other in (answered(A, "piqa", right, **changes), answered(A, "piqa", [1, 0, 0, 1])):
        assert not qualities(measures(found), [other])[0].parts
