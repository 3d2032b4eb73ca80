"""A noisy machine and a model that is too small are named by rules, and others are not."""

import random
from statistics import median

import pytest

from smelt.bench import neighbours
from smelt.bench.quiet import (
    SPREAD,
    Doubt,
    Neighbours,
    Span,
    doubt,
    is_noisy,
    judge,
    too_small,
)

NOBODY = Neighbours(cores=2, load_before=1.0, load_after=1.0, others=0.02, steal=0.0)
CALM = Doubt(0.01, 0.001)


def turns(spread, number=9, seed=0):
    draw = random.Random(seed)
    return [1.0 + draw.gauss(0, spread) for _ in range(number)]


def test_equal_turns_leave_no_doubt():
    found = doubt([0.2] * 5, [0.2] * 5)
    assert found == Doubt(0.0, 0.0) and not is_noisy(found)


def test_one_slow_turn_is_not_noise():
    assert not is_noisy(doubt([1.0, 1.0, 1.001, 1.002, 1.9], [1.0, 1.0, 1.0, 1.0, 1.9]))


def test_turns_far_apart_are_noise():
    assert is_noisy(doubt([1.0, 1.3, 0.9, 1.5, 1.1], None))


def test_two_runs_medians_differ_by_more_than_the_spread_in_few_of_many_runs():
    trials, beyond, foreseen = 400, 0, 0.0
    for trial in range(trials):
        first, second = turns(0.05, 25, seed=2 * trial), turns(0.05, 25, seed=2 * trial + 1)
        spread = doubt(first, None).spread
        beyond += abs(median(first) - median(second)) / median(first) > spread
        foreseen += spread / trials
    assert 0.02 < beyond / trials < 0.12  # 5 %, and what an IQR of 25 turns adds
    assert 0.02 < foreseen < 0.06


def test_waiting_is_the_time_off_the_processor():
    assert doubt([1.0] * 5, [0.8] * 5).waiting == pytest.approx(0.2)
    assert doubt([1.0] * 5, [1.1] * 5).waiting == 0  # clocks of two kinds may cross
    assert doubt([1.0] * 5, None).waiting is None


def test_few_turns_tell_no_spread():
    assert doubt([1.0, 2.0, 3.0], None).spread is None
    assert judge([Doubt(None, None)], NOBODY).is_quiet


def test_a_quiet_run_is_called_quiet():
    found = judge([CALM, CALM], NOBODY)
    assert found.is_quiet and found.reasons == () and found.noisy_cells == 0


@pytest.mark.parametrize(
    ("doubts", "around", "words"),
    [
        ([CALM, Doubt(0.2, 0.0)], NOBODY, "differ by up to 20% (limit 5%; 1 of 2 cells)"),
        ([CALM, Doubt(0.0, 0.3)], NOBODY, "wait for the processor up to 30%"),
        ([CALM], Neighbours(4, 1.0, 1.0, 0.5, 0.0), "other processes kept 2.0 of 4 cores busy"),
        ([CALM], Neighbours(4, 1.0, 1.0, 0.0, 0.1), "the host took 10% of the time"),
    ],
)
def test_each_sign_of_other_work_is_said(doubts, around, words):
    found = judge(doubts, around)
    assert not found.is_quiet and len(found.reasons) == 1 and words in found.reasons[0]
    assert found.to_dict()["limits"]["spread"] == SPREAD


def test_a_system_that_says_nothing_is_no_noise():
    assert judge([CALM], Neighbours(1, None, None, None, None)).is_quiet


def test_others_are_all_work_but_our_own(monkeypatch):
    ticks = iter([(1000, 10, 4000), (1300, 15, 4500)])  # at work, taken by the host, in all
    own = iter([2.0, 3.0])
    monkeypatch.setattr(neighbours, "_jiffies", lambda: next(ticks))
    monkeypatch.setattr(neighbours, "_own_seconds", lambda: next(own))
    monkeypatch.setattr(neighbours.os, "sysconf", lambda name: 100)
    found = neighbours.Watch().seen()
    assert found.others == pytest.approx((300 - 100) / 500)
    assert found.steal == pytest.approx(5 / 500)


def test_a_kernel_that_keeps_no_count_leaves_others_unknown(monkeypatch):
    monkeypatch.setattr(neighbours, "_jiffies", lambda: None)
    found = neighbours.Watch().seen()
    assert found.others is None and found.steal is None


# --- overhead ------------------------------------------------------------------------------------


def test_a_model_whose_steps_cost_the_same_whatever_they_do_is_too_small():
    (said,) = too_small({"tiny": [Span("batch 1", 2.0, 0.1), Span("batch 8", 2.2, 0.3)]})
    assert said.startswith("tiny: too small for 2 of 2 cells. batch 1")
    assert "2 ms, of which bytes and FLOPs explain 0.1; 1.9 (Python" in said


def test_a_model_near_its_floors_is_not():
    assert (
        too_small({"large": [Span("batch 1", 100.0, 80.0), Span("batch 64", 400.0, 300.0)]}) == []
    )


def test_a_slow_kernel_in_large_cells_is_no_overhead():
    spans = [Span("batch 1", 2.0, 1.5), Span("batch 64", 100.0, 10.0)]
    assert too_small({"a": spans}) == []


def test_only_the_small_model_of_two_is_named():
    found = too_small({"large": [Span("c", 10.0, 8.0)], "small": [Span("c", 10.0, 1.0)]})
    assert [said.partition(":")[0] for said in found] == ["small"]
