import threading
import time

import numpy as np
import pytest
import torch

from reference.compression import best_order, unit_vectors
from reference.samples import KINDS, outputs, random_bank, random_stats, repeated, shuffles
from smelt.compress import align
from smelt.compress.align import Aligner, activation_cost, joint_cost, pairs, weight_cost
from smelt.experts import hidden, permute_hidden


@pytest.mark.parametrize("kind", KINDS)
def test_reordering_hidden_units_changes_nothing(kind: str) -> None:
    bank, x = random_bank(kind), torch.randn(9, 4)
    mixed = permute_hidden(bank, shuffles(5, 6))
    torch.testing.assert_close(outputs(mixed, x), outputs(bank, x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_the_best_of_all_orders(kind: str) -> None:
    bank = random_bank(kind, E=4, F=5, D=3)
    labels, dominants = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 3]).flip(0)
    with Aligner() as aligner:
        order = aligner.orders(bank, labels, dominants)
    assert tuple(order[0].tolist()) == best_order(bank, 3, 0)
    assert tuple(order[2].tolist()) == best_order(bank, 1, 2)
    assert torch.equal(order[[1, 3]], torch.arange(5).repeat(2, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_is_the_inner_product_of_all_that_a_unit_is_made_of(kind: str) -> None:
    bank = random_bank(kind, dtype=torch.bfloat16)
    expected = unit_vectors(bank, 3) @ unit_vectors(bank, 1).T
    torch.testing.assert_close(weight_cost(bank, 3, 1).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("matching", ["weights", "activations", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reordered_copy_is_put_back_in_order(kind: str, matching: str) -> None:
    bank = repeated(random_bank(kind, F=16, D=6), 8)
    shuffle = shuffles(8, 16)
    mixed = permute_hidden(bank, shuffle)
    stats = random_stats()
    costs = {"weights": weight_cost, "activations": activation_cost(stats)}
    cost = (costs | {"both": joint_cost(stats)})[matching]
    labels, dominants = torch.tensor([0, 1, 0, 0, 1, 2, 1, 0]), torch.tensor([0, 1, 5])
    with Aligner() as aligner:
        order = aligner.orders(mixed, labels, dominants, cost=cost)
    restored = torch.gather(shuffle, 1, order)  # where each unit of the copy came from
    assert torch.equal(restored, shuffle[dominants[labels]])


def test_reference_first_follows_expert_0_of_the_layer() -> None:
    labels, dominants = torch.tensor([2, 0, 1, 0, -1, 1, 3]), torch.tensor([1, 2, 0, 6])
    assert pairs(labels, dominants, "first") == [(0, 1), (0, 2), (0, 3), (0, 5)]  # not 6, alone
    assert pairs(labels, dominants, "dominant") == [(1, 3), (2, 5)]
    # Expert 0 in a group of its own size > 1 is its own reference.
    assert pairs(torch.tensor([0, 0]), torch.tensor([1]), "first") == [(0, 1)]


def test_the_result_does_not_depend_on_the_number_of_workers() -> None:
    bank = random_bank("gated", E=12, F=24, D=8)
    labels, dominants = torch.arange(12) % 3, torch.arange(3)
    found = []
    for workers in (1, 2, 5):
        with Aligner(workers) as aligner:
            found.append(aligner.orders(bank, labels, dominants))
            assert torch.equal(aligner.orders(bank, labels, dominants), found[-1])  # reusable
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("workers", "memory", "most"), [(3, 1 << 30, 3), (8, 2 * 20 * 36, 2)])
def test_no_more_matrices_live_at_once_than_workers_or_memory_allow(
    workers: int, memory: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, peak, lock = 0, 0, threading.Lock()
    negated, assign = align._negated, align._assign

    def count(change: int) -> None:
        nonlocal live, peak
        with lock:
            live += change
            peak = max(peak, live)

    def slow_assign(matrix: np.ndarray) -> torch.Tensor:
        time.sleep(0.005)
        order = assign(matrix)
        count(-1)
        return order

    def counted(cost: torch.Tensor) -> np.ndarray:
        count(1)
        return negated(cost)

    monkeypatch.setattr(align, "_negated", counted)
    monkeypatch.setattr(align, "_assign", slow_assign)
    labels = torch.zeros(12, dtype=torch.int64)
    with Aligner(workers, memory) as aligner:
        aligner.orders(random_bank("gated", E=12), labels, torch.tensor([0]))
    assert peak == most


def test_activation_matching_correlates_over_tokens_routed_to_either() -> None:
    stats = random_stats(E=8, D=6)
    bank = random_bank("biased", E=8, D=6, F=5)
    either = (stats.sample_choice == 1).any(1) | (stats.sample_choice == 2).any(1)
    assert int((~(stats.sample_choice == 1).any(1) & either).sum()) > 1
    x = stats.input_sample[either]
    units = torch.cat([hidden(bank, 1, x), hidden(bank, 2, x)], 1)
    expected = torch.corrcoef(units.T)[:5, 5:]
    torch.testing.assert_close(activation_cost(stats)(bank, 1, 2), expected)


def test_experts_that_no_sampled_token_reached_are_matched_by_weight() -> None:
    stats = random_stats()
    stats.sample_choice[:] = torch.tensor([4, 5])
    bank = random_bank("gated", E=8, D=6)
    cost = activation_cost(stats)
    assert torch.equal(cost(bank, 0, 1), weight_cost(bank, 0, 1))
    assert not torch.equal(cost(bank, 4, 5), weight_cost(bank, 4, 5))


def test_a_unit_that_never_varies_correlates_with_nothing() -> None:
    bank = random_bank("gated", E=8, D=6)
    bank.up[4, 2] = 0
    cost = activation_cost(random_stats())(bank, 4, 5)
    assert torch.equal(cost[2], torch.zeros(6))
    assert cost.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_matching_by_both_adds_the_cosine_of_two_units_to_their_correlation(kind: str) -> None:
    bank, stats = random_bank(kind, E=8, D=6), random_stats(D=6)
    ours, theirs = (
        v / v.norm(dim=1, keepdim=True) for v in (unit_vectors(bank, 1), unit_vectors(bank, 2))
    )
    expected = (ours @ theirs.T).float() + activation_cost(stats)(bank, 1, 2)
    torch.testing.assert_close(joint_cost(stats)(bank, 1, 2), expected, atol=1e-5, rtol=1e-5)
