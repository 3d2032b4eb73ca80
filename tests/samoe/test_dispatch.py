"""Who is sent where: choices, places, and what a sequence may know of its neighbours."""

import math

import pytest
import torch

from reference import samoe as reference
from samoe.tiny import build, logits, tiny, tokens
from smelt.samoe.dispatch import capacity, choose, dispatch, largest, within_capacity


def test_the_choice_is_the_k_most_probable_experts_in_order():
    scores = torch.randn(40, 8)
    for count in (1, 3, 8):
        routing = choose(scores, count, is_normalised=False)
        probability = scores.softmax(-1)
        expected = [reference.best(row.tolist(), count) for row in probability]
        assert routing.choice.tolist() == expected
        torch.testing.assert_close(routing.weight, probability.gather(1, routing.choice))


def test_equal_experts_are_chosen_by_the_lower_id():
    scores = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0], [2.0] * 5])
    routing = choose(scores, 4, is_normalised=False)
    assert routing.choice.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert largest(torch.zeros(1, 64), 2).tolist() == [[0, 1]]


def test_gate_weights_are_not_renormalised_unless_asked():
    scores = torch.randn(5, 6)
    plain = choose(scores, 2, is_normalised=False).weight
    normalised = choose(scores, 2, is_normalised=True).weight
    assert (plain.sum(-1) < 1).all()
    torch.testing.assert_close(normalised, plain / plain.sum(-1, keepdim=True))


def test_gates_of_half_precision_are_float32():
    assert choose(torch.randn(3, 4).bfloat16(), 2, is_normalised=False).weight.dtype == (
        torch.float32
    )


def test_capacity_is_the_larger_of_four_and_the_even_share():
    lengths = torch.tensor([1, 16, 17, 100, 128])
    for factor, choices, experts in ((1.0, 1, 4), (1.25, 2, 8), (0.5, 1, 64)):
        expected = [max(4, math.ceil(factor * choices * t / experts)) for t in lengths.tolist()]
        assert capacity(factor, choices, lengths, experts).tolist() == expected


@pytest.mark.parametrize("num_choices", [1, 2, 3])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_places_go_to_first_choices_first_and_earlier_tokens_first(num_choices, padding):
    B, T, E = 3, 40, 5
    choice = torch.randn(B * T, E).add(torch.arange(E) * 0.4).argsort(-1)[:, :num_choices]
    choice = choice.view(B, T, num_choices)
    real = torch.ones(B, T, dtype=torch.bool)
    if padding == "left":
        real[1, :11], real[2, :29] = False, False
    elif padding == "right":
        real[1, 25:], real[2, 8:] = False, False
    for factor in (0.5, 1.0):
        limit = capacity(factor, num_choices, real.sum(1), E)
        found = within_capacity(choice, real, E, limit)
        assert found.tolist() == reference.fitting(choice.tolist(), real.tolist(), E, factor)
        assert not found[real].all()


def test_kept_choices_are_grouped_by_expert_with_tokens_in_order():
    routing = choose(torch.randn(30, 4), 2, is_normalised=False)
    kept = torch.rand(30, 2) < 0.6
    pairs = dispatch(routing, kept, 4)
    expected = [
        (e, t, k)
        for e in range(4)
        for t in range(30)
        for k in range(2)
        if kept[t, k] and routing.choice[t, k] == e
    ]
    assert pairs.token.tolist() == [t for _, t, _ in expected]
    assert pairs.weight.tolist() == [float(routing.weight[t, k]) for _, t, k in expected]
    assert pairs.sizes.tolist() == [sum(one[0] == e for one in expected) for e in range(4)]
    everything = dispatch(routing, None, 4)
    assert everything.sizes.tolist() == routing.choice.flatten().bincount(minlength=4).tolist()


# --- in a model ----------------------------------------------------------------------------------

CROWDED = {"capacity_factor": 0.5, "num_experts_per_tok": 2, "max_position_embeddings": 64}


def crowded(preset="paper", **fields):
    """A model in training mode whose experts are soon full; it drops choices at random nowhere."""
    return build(tiny(preset, **{**CROWDED, **fields})).train()


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(preset):
    model, ids = crowded(preset), tokens(3, 40)
    together = logits(model, ids)
    for sequence, expected in zip(ids, together, strict=True):
        torch.testing.assert_close(logits(model, sequence[None])[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_padding_takes_no_place_and_gives_none(preset):
    model, ids = crowded(preset), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 18:] = 0
    found = model(ids, attention_mask=mask, output_router_logits=True)
    alone = model(ids[1:, :18], output_router_logits=True)
    torch.testing.assert_close(found.logits[1, :18], alone.logits[0], rtol=0, atol=2e-5)
    first = model(ids[:1], output_router_logits=True)
    lost = first.dropped * 80 + alone.dropped * 36  # two choices a token
    torch.testing.assert_close(found.dropped, lost / (80 + 36))
    assert (alone.dropped > 0).all()


def test_padding_is_not_routed():
    model, ids = crowded(), tokens(2, 12)
    layer, pool = model.model.moe_layers()[0], model.model.pools[0]()
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = False
    for training in (True, False):
        layer.train(training)
        y = layer(torch.randn(2, 12, 16), pool, None, real).output
        assert (y[0, :5] == 0).all() and (y[1] != 0).any()
    mask = real.long()
    other = torch.where(real, ids, (ids + 7) % 32)
    assert torch.equal(
        logits(model.eval(), ids, attention_mask=mask)[real],
        logits(model, other, attention_mask=mask)[real],
    )


def test_a_dropped_token_keeps_the_stream_times_beta():
    model = crowded(num_experts_per_tok=1)
    block, pool = model.model.layers[1], model.model.pools[0]()
    h = torch.randn(2, 40, 16)
    out, scores, dropped, _ = block(h, pool)
    middle = h + block.attention(block.attention_norm(h), None, None, None)[0]
    choice = [[[int(row.argmax())] for row in half] for half in scores.view(2, 40, 4)]
    kept = torch.tensor(reference.fitting(choice, [[True] * 40] * 2, 4, 0.5))[:, :, 0]
    assert 0 < kept.sum() < 80
    assert float(dropped) == pytest.approx(1 - float(kept.float().mean()))
    assert torch.equal(out[~kept], (block.mlp.beta * middle)[~kept])
    assert ((out - block.mlp.beta * middle)[kept].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("sharing", ["pool", "pyramid", "union"])
def test_evaluation_drops_nothing(sharing):
    ids = tokens(2, 40)
    limited = crowded(sharing=sharing)
    free = crowded(sharing=sharing, capacity_factor=None)
    assert not torch.allclose(logits(limited, ids), logits(free, ids), atol=1e-3)
    assert torch.equal(logits(limited.eval(), ids), logits(free.eval(), ids))
    found = limited(ids, output_router_logits=True)
    assert found.dropped.tolist() == [0.0] * len(limited.model.moe_layers())
