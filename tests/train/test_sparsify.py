"""Laws of the schedule and of the choice of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference.healing as slow
from smelt.compress.decompose import choose_rows
from smelt.train.sparsify import (
    bounds,
    is_too_short,
    keep_share,
    row_importance,
    running,
)

PAPER = {"keep": 0.10, "initial": 0.04, "final": 0.16}


@pytest.mark.parametrize("steps", [5, 7, 50, 1000])
def test_the_schedule_is_the_papers(steps):
    shares = [keep_share(t, steps, **PAPER) for t in range(1, steps + 1)]
    assert shares == [slow.keep_share(t, steps, 0.10, 0.04, 0.16) for t in range(1, steps + 1)]
    first, last = bounds(steps, 0.04, 0.16)
    assert shares[:first] == [1.0] * first and shares[-1] == 0.10
    assert shares[steps - last - 1 :] == pytest.approx([0.10] * (last + 1))
    assert shares == sorted(shares, reverse=True)


def test_a_run_needs_a_step_between_the_two_ends():
    assert is_too_short(10, 0.5, 0.5)
    assert is_too_short(1, 0.6, 0.0)  # rounded to one step
    assert not is_too_short(10, 0.5, 0.4)
    assert not is_too_short(1, 0.04, 0.16)


@given(seed=st.integers(0, 999), share=st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_rows_are_chosen_under_one_threshold_by_entries(seed, share):
    generator = torch.Generator().manual_seed(seed)
    importances = [
        torch.randint(6, shape, generator=generator).float() for shape in ((2, 5), (1, 7), (3, 4))
    ]
    lengths = [4, 16, 9]
    masks = choose_rows(importances, lengths, share)
    expected = slow.kept_rows(importances, lengths, share)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    entries = sum(int(m.sum()) * n for m, n in zip(masks, lengths, strict=True))
    total = sum(i.numel() * n for i, n in zip(importances, lengths, strict=True))
    assert entries <= share * total * (1 + 1e-9)


def test_a_rows_worth_is_the_mean_of_weight_times_gradient(generator):
    rows, gradient = torch.randn(2, 2, 3, 4, generator=generator)
    found = row_importance(rows, gradient)
    assert found.shape == (2, 3)
    assert float(found[1, 2]) == pytest.approx(
        sum(abs(float(rows[1, 2, j] * gradient[1, 2, j])) for j in range(4)) / 4
    )


def test_the_running_mean_forgets_by_the_decay(generator):
    first, second = torch.rand(2, 1, 3, generator=generator)
    found = running(running(torch.zeros(1, 3), first, 0.85), second, 0.85)
    torch.testing.assert_close(found, 0.85 * 0.15 * first + 0.15 * second)


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_dropped_row_never_comes_back(seed):
    # Its S is zero when the next gradient is read, so it is worth nothing from then on.
    generator = torch.Generator().manual_seed(seed)
    importance = torch.zeros(2, 10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    for t in range(1, 31):
        new = torch.rand(2, 10, generator=generator) * mask
        importance = running(importance, new, 0.85)
        (kept,) = choose_rows([importance], [4], keep_share(t, 30, **PAPER))
        assert not (kept & ~mask).any()
        mask = kept
    assert int(mask.sum()) == 2
