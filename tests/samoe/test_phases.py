"""The stopwatch of a step: it changes nothing, and its parts make the whole."""

import dataclasses
import time

import pytest
import torch

from samoe.tiny import PRESETS, build, checkpointed, tiny, tokens
from smelt.samoe import pool
from smelt.samoe.phases import timed

IDS = tokens(4, 16)


def step(model):
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("fields", [{}, {"mix": "weight"}, {"sharing": "residual"}])
@pytest.mark.parametrize("preset", PRESETS)
def test_timing_changes_no_value_and_no_gradient(preset, fields):
    model = build(tiny(preset, **fields)).train()
    plain = step(model)
    with timed():
        watched = step(model)
    assert torch.equal(plain[0], watched[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], watched[1], strict=True))


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("fields", [{}, {"mix": "weight"}, {"sharing": "residual"}])
def test_the_phases_add_up_to_the_step(fields, is_checkpointed):
    model = build(tiny(**fields)).train()
    if is_checkpointed:
        checkpointed(model)
    step(model)
    start = time.perf_counter()
    with timed() as watch:
        step(model)
    whole = time.perf_counter() - start
    assert sum(watch.seconds.values()) == pytest.approx(whole, rel=0.1)
    expected = {"router", "dispatch", "experts", "attention", "dense", "head", "other"}
    expected |= {"mixing"} if fields.get("mix") == "weight" else set()
    assert watch.seconds.keys() == expected
    assert min(watch.seconds.values()) > 0


SLOW = {
    "attention": lambda model: model.model.layers[1].attention,
    "dense": lambda model: model.model.layers[0].mlp,
    "router": lambda model: model.model.layers[1].mlp.router,
    "head": lambda model: model.lm_head,
    "other": lambda model: model.model.embed_tokens,
}


class Sleepy(torch.autograd.Function):
    """The value, after 30 ms; and its gradient, after 60."""

    @staticmethod
    def forward(ctx, value):
        time.sleep(0.03)
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.06)
        return gradient


@pytest.mark.parametrize("phase", SLOW)
def test_time_is_booked_to_the_phase_that_takes_it_forwards_and_backwards(phase):
    model = build(tiny(num_hidden_layers=2)).train()

    def slowed(module, inputs, output):
        if isinstance(output, tuple):
            return (Sleepy.apply(output[0]), *output[1:])
        return Sleepy.apply(output)

    SLOW[phase](model).register_forward_hook(slowed)
    with timed() as watch:
        step(model)
    assert watch.seconds[phase] > 0.09


@pytest.mark.parametrize(
    ("sharing", "mix", "phase"),
    [
        ("residual", "activation", "dense"),
        ("pool", "activation", "experts"),
        ("pool", "weight", "experts"),
    ],
)
def test_a_dense_ffn_beside_experts_and_the_experts_are_booked_apart(sharing, mix, phase):
    model = build(tiny(num_hidden_layers=2, sharing=sharing, mix=mix)).train()
    layer = model.model.layers[1]
    if sharing == "residual":
        layer.residual.register_forward_hook(lambda m, i, output: Sleepy.apply(output))
    else:
        experts = layer.mlp.pool  # its own: the only layer that has experts
        activation = experts.activation
        del experts.activation  # a module, which a function cannot stand in for
        experts.activation = lambda x: activation(Sleepy.apply(x))
    with timed() as watch:
        step(model)
    assert watch.seconds[phase] > 0.09


def test_mixing_weights_is_a_phase_of_its_own(monkeypatch):
    model = build(tiny(num_hidden_layers=2, mix="weight")).train()
    mixed = pool.mixed

    def slowed(*args):
        weights = mixed(*args)
        return dataclasses.replace(weights, up=Sleepy.apply(weights.up))

    monkeypatch.setattr(pool, "mixed", slowed)
    with timed() as watch:
        step(model)
    assert watch.seconds["mixing"] > 0.09


def test_outside_nothing_is_measured():
    model = build(tiny())
    with timed() as watch:
        pass
    before = dict(watch.seconds)
    step(model)
    assert dict(watch.seconds) == before and before.keys() == {"other"}
