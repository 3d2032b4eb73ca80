"""The whole model is its slow reference, and the controls are what SaMoE becomes at its corners."""

import pytest
import torch
from torch import Tensor

from reference import samoe as reference
from samoe.tiny import PRESETS, SCOPES, SHARING, build, logits, tiny, tokens
from smelt.samoe.model import SaMoEForMaskedLM


def leaves(model) -> dict[str, Tensor]:
    """The parameters by all of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def check_against_reference(model, ids, real=None, *, with_gradients=True):
    inputs = {} if real is None else {"attention_mask": real.long()}
    found = model(ids, **inputs).logits
    expected = reference.logits(
        model.config,
        leaves(model),
        ids,
        real=None if real is None else real.tolist(),
        is_training=model.training,
    )
    if real is not None:
        found, expected = found[real], expected[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5)
    if with_gradients:
        gradient = torch.randn_like(found)
        parameters = list(model.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(found, parameters, gradient),
            torch.autograd.grad(expected, parameters, gradient),
            rtol=1e-3,
            atol=2e-3,
        )


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARING)
def test_every_sharing_rule_is_its_loop_with_gradients(sharing):
    config = tiny(sharing=sharing, moe_every=1, num_experts_per_tok=2, norm_topk_prob=True)
    check_against_reference(build(config), tokens(2, 6))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 1},
        {"moe_every": 2, "mix": "weight", "alpha_scope": "matrix", "norm_topk_prob": True},
        {"sharing": "residual"},
        {"tie_word_embeddings": False, "use_beta": False, "shared_router": True, "pool_size": 3},
    ],
    ids=" ".join,
)
def test_the_modern_preset_is_its_loop_with_gradients(fields):
    check_against_reference(build(tiny("modern", **fields)), tokens(2, 6))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", PRESETS)
def test_masked_models_are_their_loop(preset, implementation):
    config = tiny(preset, num_hidden_layers=2, attn_implementation=implementation)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    model = build(config, SaMoEForMaskedLM)
    check_against_reference(model, tokens(2, 6), with_gradients=False)
    check_against_reference(model, tokens(2, 6), real, with_gradients=False)


@pytest.mark.parametrize("sharing", ["pool", "pyramid", "union"])
def test_training_with_full_experts_and_padding_is_its_loop(sharing):
    config = tiny(sharing=sharing, capacity_factor=0.1, num_experts_per_tok=2, num_hidden_layers=2)
    model, real = build(config).train(), torch.ones(2, 20, dtype=torch.bool)
    real[1, 14:] = False
    check_against_reference(model, tokens(2, 20), real)


def test_the_implementations_of_attention_agree():
    real = torch.ones(3, 8, dtype=torch.long)
    real[1, :3] = 0
    for preset in PRESETS:
        for kind in (None, SaMoEForMaskedLM):
            found = [
                logits(
                    build(
                        tiny(preset, attn_implementation=name, num_key_value_heads=1),
                        *([kind] if kind else []),
                    ),
                    tokens(3, 8),
                    attention_mask=real,
                )[real.bool()]
                for name in ("eager", "sdpa")
            ]
            torch.testing.assert_close(*found, rtol=0, atol=1e-5)


# --- corners -------------------------------------------------------------------------------------


def same_bits(first, second, ids):
    """Equal parameters by name, logits and gradients."""
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    gradients = []
    for model in (first, second):
        loss = model(ids, labels=ids).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.equal(logits(first, ids), logits(second, ids))


@pytest.mark.parametrize("preset", PRESETS)
def test_hard_mixing_is_grouped_sharing_bit_for_bit(preset):
    hard, groups = (
        build(tiny(preset, moe_every=1, **fields)).train()
        for fields in ({"mix": "hard"}, {"sharing": "groups"})
    )
    same_bits(hard, groups, tokens(2, 16))


@pytest.mark.parametrize("preset", PRESETS)
def test_hard_mixing_of_as_many_entries_as_layers_is_ar_moe_bit_for_bit(preset):
    hard = build(tiny(preset, moe_every=1, mix="hard", pool_size=4)).train()
    own = build(tiny(preset, moe_every=1, sharing="none")).train()
    same_bits(hard, own, tokens(2, 16))


def copy_into(model, other, *, alpha):
    """The parameters that two models have in common; then the pool from the other's experts."""
    theirs = other.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in theirs and theirs[name].shape == parameter.shape:
                parameter.copy_(theirs[name])
        for layer, row in zip(model.model.moe_layers(), alpha, strict=True):
            value = torch.tensor(row)
            if layer.alpha_scope == "expert":
                value = value[:, None]
            elif layer.alpha_scope == "matrix":
                ones = torch.ones_like(value)
                inner = value if layer.mix == "weight" else ones
                value = torch.stack([*[inner] * (layer.num_matrices - 1), value], 1)
            layer.alpha.copy_(value)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mix", ["activation", "weight"])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_hot_alpha_over_as_many_entries_as_layers_is_ar_moe(preset, mix, scope):
    own = build(tiny(preset, moe_every=1, sharing="none"))
    pooled = build(tiny(preset, moe_every=1, pool_size=4, mix=mix, alpha_scope=scope))
    copy_into(pooled, own, alpha=torch.eye(4).tolist())
    pools = [layer.pool for layer in own.model.moe_layers()]
    with torch.no_grad():
        for name, parameter in pooled.model.pools[0].named_parameters():
            axis = 2 if name == "down" else 1
            parameter.copy_(torch.cat([getattr(pool, name) for pool in pools], axis))
    found, expected = (logits(model, tokens()) for model in (pooled, own))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mix", ["activation", "weight"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_pool_of_one_entry_at_alpha_one_is_share_all_bit_for_bit(preset, mix):
    tied = build(tiny(preset, sharing="all", moe_every=1))
    pooled = build(tiny(preset, pool_size=1, mix=mix, moe_every=1))
    copy_into(pooled, tied, alpha=[[1.0]] * 4)
    assert torch.equal(logits(pooled, tokens()), logits(tied, tokens()))
    assert torch.equal(logits(pooled.train(), tokens()), logits(tied.train(), tokens()))


@pytest.mark.parametrize("preset", PRESETS)
def test_share_all_is_ar_moe_whose_layers_have_equal_experts(preset):
    tied = build(tiny(preset, sharing="all", moe_every=1))
    own = build(tiny(preset, sharing="none", moe_every=1))
    missing = own.load_state_dict(tied.state_dict(), strict=False).missing_keys
    assert missing and all(".mlp.pool." in name for name in missing)
    for layer in own.model.moe_layers():
        layer.pool.load_state_dict(tied.model.pools[0].state_dict())
    assert torch.equal(logits(own, tokens()), logits(tied, tokens()))


@pytest.mark.parametrize("preset", PRESETS)
def test_wide_share_all_is_activation_mixing_with_alpha_one(preset):
    wide = build(tiny(preset, sharing="all", moe_intermediate_size=32))
    mixed = build(tiny(preset, moe_intermediate_size=16))
    copy_into(mixed, wide, alpha=[[1.0, 1.0]] * len(mixed.model.moe_layers()))
    bias = wide.model.pools[0].down_bias
    if bias is not None:
        with torch.no_grad():  # each entry adds its own: the halves make the whole
            mixed.model.pools[0].down_bias.copy_(torch.cat([0.25 * bias, 0.75 * bias], 1))
    found, expected = (logits(model, tokens()) for model in (mixed, wide))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_without_beta_is_beta_one_and_a_frozen_alpha_is_the_same_function():
    whole, without, frozen = (
        build(tiny(**fields)) for fields in ({}, {"use_beta": False}, {"train_alpha": False})
    )
    with torch.no_grad():
        for layer in whole.model.moe_layers():
            layer.beta.fill_(1)
    extra = without.load_state_dict(whole.state_dict(), strict=False).unexpected_keys
    assert extra == [f"model.layers.{i}.mlp.beta" for i in (1, 3)]
    frozen.load_state_dict(whole.state_dict())
    assert torch.equal(logits(without, tokens()), logits(whole, tokens()))
    assert torch.equal(logits(frozen, tokens()), logits(whole, tokens()))
    still = [name for name, p in frozen.named_parameters() if not p.requires_grad]
    assert still == [f"model.layers.{i}.mlp.alpha" for i in (1, 3)]
    frozen.train()(tokens(), labels=tokens()).loss.backward()
    assert all((p.grad is None) == (n in still) for n, p in frozen.named_parameters())


def test_one_router_for_all_layers_is_equal_routers():
    shared, own = build(tiny(shared_router=True)), build(tiny())
    own.load_state_dict(shared.state_dict(), strict=False)
    with torch.no_grad():
        for layer in own.model.moe_layers():
            layer.router.weight.copy_(shared.model.router.weight)
    assert torch.equal(logits(own, tokens()), logits(shared, tokens()))
    assert all(layer.router is None for layer in shared.model.moe_layers())
