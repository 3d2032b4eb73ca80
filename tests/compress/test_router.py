from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference.samples import random_stats
from smelt.compress.refit import refit, sigmoid_mass, softmax_mass
from smelt.compress.router import ROUTERS
from smelt.errors import PlanError
from smelt.routing import LayerStats

LABELS = torch.tensor([0, 1, 0, 2, 1, -1, 2, 0])
DOMINANTS = torch.tensor([2, 4, 6])


@pytest.mark.parametrize("shape", [(8, 6), (8,)])
def test_dominant_rows_are_the_kept_rows_bit_for_bit(shape: tuple[int, ...]) -> None:
    rows = torch.randn(*shape).bfloat16()
    found = ROUTERS["dominant"](rows, LABELS, DOMINANTS)
    assert torch.equal(found, rows[[2, 4, 6]])


@pytest.mark.parametrize("shape", [(8, 6), (8,)])
def test_mean_rows_are_the_means_of_their_groups(shape: tuple[int, ...]) -> None:
    rows = torch.randn(*shape)
    found = ROUTERS["mean"](rows, LABELS, DOMINANTS)
    expected = torch.stack([rows[g == LABELS].mean(0) for g in range(3)])
    torch.testing.assert_close(found, expected)
    alone = torch.arange(8)
    assert torch.equal(ROUTERS["mean"](rows.bfloat16(), alone, alone), rows.bfloat16())


def routed(weight: Tensor, num_tokens: int = 2000, top_k: int = 2) -> LayerStats:
    torch.manual_seed(1)
    return random_stats(E=len(weight), D=weight.shape[1], N=num_tokens, K=top_k, router=weight)


def surprise(weight: Tensor, stats: LayerStats, labels: Tensor) -> float:
    """Cross-entropy of the new gates against the old ones summed by group, in nats."""
    target, _ = softmax_mass(stats, labels, len(weight))
    log_p = (stats.input_sample.float() @ weight.float().T).log_softmax(1)
    return -float((target * log_p).sum(1).mean())


def test_refit_gates_fresh_tokens_more_like_the_original_than_single_rows_or_their_means() -> None:
    # Members that answer to different inputs: what the dominant row alone knows nothing of.
    weight = torch.randn(8, 16) / 3
    stats = routed(weight)
    labels, dominants = torch.arange(8) % 4, torch.arange(4)
    fitted, bias = refit(
        weight, None, stats, labels, dominants, scoring="softmax", top_k=2, ridge=0.01
    )
    assert bias is None
    torch.manual_seed(5)
    fresh = random_stats(E=8, D=16, N=2000, router=weight)
    after = surprise(fitted, fresh, labels)
    assert after < 0.8 * surprise(ROUTERS["dominant"](weight, labels, dominants), fresh, labels)
    assert after < surprise(ROUTERS["mean"](weight, labels, dominants), fresh, labels)


def test_refit_keeps_the_dominant_rows_where_nothing_is_better() -> None:
    # Singletons, renormalised gates of all experts: the original routing is the target exactly.
    weight = torch.randn(4, 6)
    stats = routed(weight, 400, top_k=4)
    alone = torch.arange(4)
    fitted, _ = refit(weight, None, stats, alone, alone, scoring="softmax", top_k=4)
    torch.testing.assert_close(fitted, weight, atol=1e-4, rtol=0)


def test_refit_of_hardly_any_tokens_is_the_dominant_rows() -> None:
    weight = torch.randn(8, 6)
    for num_tokens in (1, 3):
        stats = routed(weight, num_tokens)
        fitted, _ = refit(weight, None, stats, LABELS, DOMINANTS, scoring="softmax", top_k=2)
        assert torch.equal(fitted, weight[DOMINANTS])


def test_refit_of_noise_is_never_worse_than_the_dominant_rows_on_held_out_tokens() -> None:
    # Choices that no linear router of the input can know, and far more weights than tokens.
    weight = torch.randn(8, 64)
    stats = routed(weight, 60)
    noise = torch.rand(60, 8).topk(2).indices
    stats = replace(stats, sample_choice=noise)
    labels, dominants = torch.arange(8) % 4, torch.arange(4)
    fitted, _ = refit(
        weight, None, stats, labels, dominants, scoring="softmax", top_k=2, ridge=1e-6
    )
    held_out = torch.arange(60) // 3 % 5 == 4
    unseen = replace(
        stats,
        input_sample=stats.input_sample[held_out],
        sample_logits=stats.sample_logits[held_out],
        sample_choice=stats.sample_choice[held_out],
        sample_weight=stats.sample_weight[held_out],
    )
    assert surprise(fitted, unseen, labels) <= surprise(weight[:4], unseen, labels)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_refit_lowers_its_loss_in_every_shape_of_router(scoring: str, has_bias: bool) -> None:
    weight, bias = torch.randn(8, 6), torch.randn(8)
    stats = routed(weight)
    if has_bias:
        stats = replace(stats, sample_logits=stats.sample_logits + bias)
    fitted, new_bias = refit(
        weight.bfloat16().float(),
        bias if has_bias else None,
        stats,
        LABELS,
        DOMINANTS,
        scoring=scoring,
        top_k=2,
    )
    assert fitted.shape == (3, 6)
    assert (new_bias is not None) == has_bias
    assert not torch.equal(fitted, weight[DOMINANTS])
    again, _ = refit(
        weight.bfloat16().float(),
        bias if has_bias else None,
        stats,
        LABELS,
        DOMINANTS,
        scoring=scoring,
        top_k=2,
    )
    assert torch.equal(again, fitted)


def test_the_target_is_the_gate_mass_of_the_chosen_members_only() -> None:
    stats = random_stats(E=8, K=3)
    mass, chosen = softmax_mass(stats, LABELS, 3)
    scores, hit = sigmoid_mass(stats, LABELS, 3)
    for token in range(20):
        expected, summed = [0.0] * 3, [0.0] * 3
        for expert, weight in zip(
            stats.sample_choice[token].tolist(), stats.sample_weight[token].tolist(), strict=True
        ):
            group = int(LABELS[expert])
            if group >= 0:
                expected[group] += weight
                summed[group] += float(stats.sample_logits[token, expert].sigmoid())
        torch.testing.assert_close(mass[token], torch.tensor(expected))
        torch.testing.assert_close(scores[token], torch.tensor(summed).clamp(max=0.999))
        assert chosen[token].tolist() == hit[token].tolist() == [e > 0 for e in expected]


def test_unnormalised_gates_keep_the_mass_that_they_have() -> None:
    stats = random_stats(E=8, K=2)
    share = stats.sample_logits.softmax(1).gather(1, stats.sample_choice)
    mass, _ = softmax_mass(replace(stats, sample_weight=2.5 * share), torch.arange(8), 8)
    torch.testing.assert_close(mass.sum(1), share.sum(1))


def test_refit_does_not_sharpen_gates_that_are_not_normalised() -> None:
    # Nothing is merged: the mass outside the chosen experts is what it is, not what is missing.
    weight, alone = torch.randn(6, 6), torch.arange(6)
    stats = routed(weight, 400)
    share = stats.sample_logits.softmax(1).gather(1, stats.sample_choice)
    stats = replace(stats, sample_weight=share)
    fitted, _ = refit(weight, None, stats, alone, alone, scoring="softmax", top_k=2, ridge=1e-4)
    torch.testing.assert_close(fitted, weight, atol=1e-3, rtol=0)


def test_a_router_that_reads_something_else_is_refused() -> None:
    stats = random_stats(E=8)
    with pytest.raises(PlanError, match="reads what its experts read"):
        refit(torch.randn(8, 6), None, stats, LABELS, DOMINANTS, scoring="softmax", top_k=2)
