"""Laws of gradients: what adds up, what streams, and what the signal-to-noise ratio is."""

import json
import math

import pytest
import torch

from checkpoints import random_model, tiny_config
from smelt.analyse import gradients
from smelt.analyse.gradients import agreement, alignment, cosines, gradient_flow
from smelt.analyse.moments import Moments, Signal
from smelt.analyse.parts import EXPERT_TENSORS, Part, cut_experts, find_parts
from smelt.analyse.run import plain
from smelt.errors import CheckpointError

SHARED = {
    "pool": {},
    "weight": {"mix": "weight"},
    "by expert": {"alpha_scope": "expert"},
    "all": {"sharing": "all"},
    "groups": {"sharing": "groups"},
    "pyramid": {"sharing": "pyramid"},
    "union": {"sharing": "union"},
    "modern": {"preset": "modern", "num_hidden_layers": 3},
    "masked": {"is_causal": False},
}


def plain_gradients(net, batches):
    """Every parameter's gradient, micro-batch by micro-batch, all of them kept: [M, …]."""
    net.train()
    found = {name: [] for name, p in net.named_parameters() if p.requires_grad}
    for batch in batches:
        net.zero_grad()
        net(**batch, output_router_logits=True).loss.backward()
        for name, parameter in net.named_parameters():
            if name in found:
                gradient = parameter.grad
                found[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    net.zero_grad()
    net.eval()
    return {name: torch.stack(list(map(torch.clone, all))).double() for name, all in found.items()}


# --- shared experts ------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", SHARED.values(), ids=SHARED)
def test_the_layers_contributions_add_up_to_the_gradient_of_the_pool(model, micro_batches, fields):
    net, batches = model(**fields), micro_batches(3)
    flow = gradient_flow(net, batches)
    whole = plain_gradients(net, batches)
    shared = [part for part in flow.parts if part.kind == "experts" and len(part.layers) > 1]
    assert shared and len(flow.contributions) == sum(len(part.layers) for part in shared)
    names = {id(p): name for name, p in net.named_parameters()}
    for part in shared:
        own = [one for one in flow.contributions if one.layers[0] in part.layers]
        for name, parameter in part.parameters.items():
            total = sum(one.moments[name].mean for one in own)
            expected = whole[names[id(parameter)]].mean(0)
            torch.testing.assert_close(total, part.moments[name].mean, rtol=1e-4, atol=1e-8)
            expected = cut_experts(name, expected, part.entries)
            torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-8)


def test_own_experts_get_no_contributions_and_one_gradient_per_layer(model, micro_batches):
    flow = gradient_flow(model(sharing="none"), micro_batches(2))
    assert not flow.contributions
    assert [part.layers for part in flow.experts()] == [(0,), (1,), (2,)]


def test_an_entry_with_no_weight_in_any_layer_gets_no_gradient(model, micro_batches):
    net = model(pool_size=3)
    with torch.no_grad():
        for layer in net.model.moe_layers():
            layer.alpha[1] = 0
    flow = gradient_flow(net, micro_batches(2))
    for part in (*flow.contributions, *(p for p in flow.parts if p.entries)):
        norm = part.signal().norm
        assert not norm[:, 1].any()
        assert norm[:, [0, 2]].any(0).all()


def test_equal_contributions_are_aligned_and_opposite_ones_cancel():
    one = torch.ones(3, 3)
    assert alignment(one) == pytest.approx(3)
    assert alignment(torch.eye(4)) == pytest.approx(1)
    sign = torch.tensor([1.0, -1.0])
    assert alignment(torch.outer(sign, sign)) == pytest.approx(0)
    assert cosines(4 * torch.outer(sign, sign)).tolist() == [[1, -1], [-1, 1]]


def test_agreement_is_the_inner_product_of_mean_contributions(model, micro_batches):
    flow = gradient_flow(model(), micro_batches(2))
    gram = agreement(flow.contributions)
    for entry in range(2):
        vectors = [
            torch.cat([part.moments[n].mean[:, entry].flatten() for n in part.parameters])
            for part in flow.contributions
        ]
        flat = torch.stack(vectors)
        torch.testing.assert_close(gram[entry], flat @ flat.T)


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [*SHARED.values(), {"sharing": "residual"}, {"sharing": "dense"}]
)
def test_every_parameter_that_trains_belongs_to_one_part(model, fields):
    net = model(**fields)
    found = [id(p) for part in find_parts(net) for p in part.parameters.values()]
    assert sorted(found) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert not [part for part in find_parts(net) if part.kind == "other"]


def test_a_frozen_alpha_has_no_gradient_to_look_at(model, micro_batches):
    net = model(train_alpha=False, use_beta=False)
    assert not [part for part in find_parts(net) if part.kind == "mixing"]
    gradient_flow(net, micro_batches(2))


def test_squares_and_scatter_of_the_parts_add_up_to_those_of_the_model(model, micro_batches):
    net, batches = model(), micro_batches(3)
    report = gradients.report(gradient_flow(net, batches))
    whole = torch.cat([g.reshape(len(g), -1) for g in plain_gradients(net, batches).values()], 1)
    mean = whole.mean(0)
    scatter = (whole - mean).square().sum()
    assert report["model"]["mean_norm"] == pytest.approx(float(mean.norm()), rel=1e-4)
    assert report["model"]["noise"] == pytest.approx(float(scatter) / 2, rel=1e-4)
    norm = float(whole.square().sum(1).mean().sqrt())
    assert report["model"]["norm"] == pytest.approx(norm, rel=1e-4)


def test_the_units_of_experts_are_all_of_their_values():
    E, P, F, D = 3, 2, 5, 4
    shapes = {
        "up": (E, P * F, D),
        "gate": (E, P * F, D),
        "down": (E, D, P * F),
        "up_bias": (E, P * F),
        "gate_bias": (E, P * F),
        "down_bias": (E, P, D),
    }
    assert set(shapes) == set(EXPERT_TENSORS)
    for name, shape in shapes.items():
        tensor = torch.zeros(shape)
        tensor[1] = 1  # expert 1
        entry = tensor[1, :, F:] if name == "down" else tensor[1, 1:] if "down" in name else None
        entry = tensor[1, F:] if entry is None else entry
        entry += 1  # of its pool entry 1
        cut = cut_experts(name, tensor, P)
        assert cut.unique().tolist() == [0, 1, 2]
        assert cut[0].eq(0).all() and cut[1, 0].eq(1).all() and cut[1, 1].eq(2).all()
        assert cut.numel() == tensor.numel()


# --- signal and noise ----------------------------------------------------------------------------


def moments_of(vectors):
    found = Moments()
    for vector in vectors:
        found.add(vector)
    return found


def test_streaming_moments_are_those_of_all_vectors_at_once():
    vectors = torch.randn(7, 3, 11) + 100
    found = moments_of(vectors)
    mean = vectors.double().mean(0)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.scatter, (vectors.double() - mean).square().sum((0, 2)))


def test_equal_micro_batches_have_an_infinite_ratio_and_null_in_json(model, micro_batches):
    flow = gradient_flow(model(), micro_batches(1) * 3)
    for part in flow.parts:
        signal = part.signal()
        assert not signal.scatter.any()
        has_gradient = signal.mean_square > 0
        assert signal.snr[has_gradient].isposinf().all()
        assert signal.snr[~has_gradient].isnan().all()
    value = plain(gradients.report(flow))
    assert value["model"]["snr"] is None and value["model"]["noise"] == 0
    json.dumps(value, allow_nan=False)


def test_the_ratio_of_known_gradients_is_the_closed_form():
    # ±: g = μ + s·e, s = ±1 equally often: ‖ḡ‖² = ‖μ‖², scatter = M‖e‖²
    mu, e, M = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), 8
    signal = Signal.of(moments_of(mu + sign * e for sign in (1, -1) * (M // 2)))
    noise = M * 4 / (M - 1)
    assert float(signal.plain_snr) == pytest.approx(25 / 4)
    assert float(signal.noise) == pytest.approx(noise)
    assert float(signal.signal) == pytest.approx(25 - noise / M)
    assert float(signal.snr) == pytest.approx((25 - noise / M) / noise)
    assert float(signal.norm) == pytest.approx(math.sqrt(25 + 4))


def test_signal_and_noise_are_unbiased_where_the_plain_ratio_is_not():
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((40,), 0.1)  # ‖μ‖² = 0.4, tr Σ = 40
    draws = mean + torch.randn(400, 5, 40, generator=generator)
    found = [Signal.of(moments_of(five)) for five in draws]
    signal = torch.stack([one.signal for one in found])
    noise = torch.stack([one.noise for one in found])
    error = float(signal.std()) / math.sqrt(len(found))
    assert float(signal.mean()) == pytest.approx(0.4, abs=4 * error)
    assert float(noise.mean()) == pytest.approx(40, rel=0.02)
    plain_snr = torch.stack([one.plain_snr for one in found]).mean()
    assert float(plain_snr) > 10 * 0.4 / 40


def test_a_micro_batch_that_sends_nothing_counts_as_a_gradient_of_zero():
    weight = torch.nn.Parameter(torch.zeros(3))
    part = Part("other", {"w": weight})
    for gradient in (None, torch.ones(3), None, torch.ones(3)):
        part.add({"w": gradient})
    assert part.moments["w"].mean.tolist() == [0.5] * 3
    assert part.signal().count == 4
    assert float(part.signal().scatter) == 3


def test_moments_of_units_add_up_over_tensors_and_units():
    a, b = torch.randn(5, 2, 3), torch.randn(5, 2, 4)
    apart = Signal.of(moments_of(a), moments_of(b))
    joined = Signal.of(moments_of(torch.cat([a, b], -1)))
    torch.testing.assert_close(apart.mean_square, joined.mean_square)
    torch.testing.assert_close(apart.scatter, joined.scatter)
    whole = Signal.of(moments_of(torch.cat([a, b], -1).flatten(1)))
    torch.testing.assert_close(joined.pooled().snr, whole.snr)


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_per_expert_add_up_and_capacity_takes_what_the_model_drops(
    model, micro_batches, top_k
):
    net, batches = model(num_experts_per_tok=top_k), micro_batches(2, rows=3)
    load = gradient_flow(net, batches).load
    N = 2 * 3 * 24
    assert [int(layer.sum()) for layer in load.chosen] == [N * top_k] * 3
    net.train()
    with torch.no_grad():
        dropped = [net(**batch, output_router_logits=True).dropped for batch in batches]
    kept = (1 - torch.stack(dropped).mean(0)) * N * top_k
    assert [int(layer.sum()) for layer in load.taken] == kept.round().int().tolist()
    assert any(int(t.sum()) < int(c.sum()) for t, c in zip(load.taken, load.chosen, strict=True))


def test_an_expert_without_tokens_gets_no_gradient(model, micro_batches):
    net = model(sharing="none", num_experts=16, num_experts_per_tok=1)
    flow = gradient_flow(net, micro_batches(2, rows=1, length=8))
    idle = torch.cat([taken == 0 for taken in flow.load.taken])
    norm = torch.cat([part.signal().norm[:, 0] for part in flow.experts()])
    assert idle.any() and not idle.all()
    assert torch.equal(norm == 0, idle)


def test_a_stored_expert_counts_the_tokens_of_all_its_layers(model, micro_batches):
    flow = gradient_flow(model(sharing="pyramid"), micro_batches(2))
    report = gradients.report(flow)
    (stored,) = report["experts_stored"]["parts"]
    by_layer = [part["tokens"] for part in report["experts_by_layer"]["parts"]]
    assert stored["tokens"] == [sum(column) for column in zip(*by_layer, strict=True)]
    assert sum(map(sum, by_layer)) == sum(map(sum, report["tokens_taken_per_expert"]))


# --- the model -----------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(model, micro_batches):
    net, batches = model(), micro_batches(2)
    before = net(**batches[0]).logits
    gradient_flow(net, batches)
    assert not net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert torch.equal(net(**batches[0]).logits, before)


def test_weights_that_are_no_numbers_are_an_error_that_says_where(model, micro_batches):
    net = model()
    with torch.no_grad():
        net.model.norm.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="micro-batch 0 is nan.*earlier checkpoint"):
        gradient_flow(net, micro_batches(2))


def test_a_stock_moe_has_experts_routers_and_the_rest(micro_batches):
    net = random_model(tiny_config("qwen3_moe", vocab_size=300))
    batches = micro_batches(2)
    flow = gradient_flow(net, batches)
    kinds = {part.kind for part in flow.parts}
    assert kinds == {"experts", "router", "other"}
    assert [part.signal().norm.shape for part in flow.experts()] == [(8, 1)] * 2
    total = Signal.of(*[m for part in flow.parts for m in _flat(part)])
    whole = torch.cat([g.reshape(len(g), -1) for g in plain_gradients(net, batches).values()], 1)
    assert float(total.mean_norm) == pytest.approx(float(whole.mean(0).norm()), rel=1e-4)


def _flat(part):
    """A part's moments, each as one unit."""
    for one in part.moments.values():
        whole = Moments()
        whole.count, whole.mean, whole.scatter = one.count, one.mean.flatten(), one.scatter.sum()
        yield whole
