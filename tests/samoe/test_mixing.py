"""The experts of a layer against loops: one row, one expert and one pool entry at a time."""

import pytest
import torch

from reference import samoe as reference
from samoe.tiny import SCOPES, build, tiny
from smelt.errors import RecipeError
from smelt.samoe import grouped
from smelt.samoe.pool import pooled_experts

KINDS = {
    "ungated with bias": {"is_gated": False, "has_bias": True},
    "ungated": {"is_gated": False, "has_bias": False},
    "gated with bias": {"is_gated": True, "has_bias": True, "hidden_act": "silu"},
    "gated": {"is_gated": True, "has_bias": False, "hidden_act": "silu"},
}
SIZES = torch.tensor([3, 0, 21, 1])  # an expert without rows, one of more rows than columns
NUM_ROWS = int(SIZES.sum())
EXPERT = torch.arange(4).repeat_interleave(SIZES).tolist()


def draw(*shape):
    return torch.randn(*shape, requires_grad=True)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


# --- grouped_linear ------------------------------------------------------------------------------


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize("path", ["loop", "kernel"])
def test_a_grouped_product_is_the_product_of_each_row_with_its_gradients(path, has_bias, has_scale):
    x, weight = draw(NUM_ROWS, 16), draw(4, 8, 16)
    bias = draw(4, 8) if has_bias else None
    scale = draw(4, 16) if has_scale else None
    function = grouped.grouped_linear if path == "loop" else grouped._kernel
    found = function(x, weight, bias, SIZES, scale)
    expected = reference.grouped_linear(x, weight, bias, SIZES.tolist(), scale)
    close(found, expected)
    leaves = [t for t in (x, weight, bias, scale) if t is not None]
    gradient = torch.randn_like(found)
    close(
        torch.autograd.grad(found, leaves, gradient),
        torch.autograd.grad(expected, leaves, gradient),
    )


@pytest.mark.parametrize("wanted", range(4))
def test_the_gradient_of_one_input_does_not_need_the_others(wanted):
    inputs = [torch.randn(NUM_ROWS, 16), torch.randn(4, 8, 16), torch.randn(4, 8)]
    inputs.append(torch.rand(4, 16) + 0.5)
    gradients = []
    for chosen in (range(4), [wanted]):
        x, weight, bias, scale = (
            t.clone().requires_grad_(i in chosen) for i, t in enumerate(inputs)
        )
        out = grouped.grouped_linear(x, weight, bias, SIZES, scale)
        leaf = (x, weight, bias, scale)[wanted]
        gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    close(*gradients)


@pytest.mark.parametrize("shape", [(512, 640), (640, 512)])
@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("has_scale", [False, True])
def test_few_rows_through_large_matrices_are_the_same_products(has_scale, is_cut, shape):
    # Without gradients these take another way: one, two, three and more rows each their own.
    sizes = torch.tensor([1, 2, 0, 3, 5])
    outputs, inputs = shape
    weight, bias = torch.randn(5, outputs, 2 * inputs), torch.randn(5, outputs)
    weight = weight[:, :, inputs:] if is_cut else weight[:, :, inputs:].contiguous()
    x, scale = torch.randn(11, inputs), torch.randn(5, inputs) if has_scale else None
    assert grouped._is_read_bound(x, weight, sizes.tolist())
    for one in (bias, None):
        expected = reference.grouped_linear(x, weight, one, sizes.tolist(), scale)
        with torch.no_grad():
            found = grouped.grouped_linear(x, weight, one, sizes, scale)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_no_rows_give_no_rows():
    out = grouped.grouped_linear(
        torch.randn(0, 16), torch.randn(4, 8, 16), torch.randn(4, 8), torch.zeros(4).long()
    )
    assert out.shape == (0, 8)


# --- mixing --------------------------------------------------------------------------------------


def layer_and_pool(**fields):
    model = build(tiny(pool_size=3, **fields))
    return model.config, model.model.moe_layers()[0], model.model.pools[0]


def looped(config, pool, alpha, x):
    tensors = dict(pool.named_parameters())
    rows = [
        reference.mixed_output(config, tensors, alpha, row, e, config.pool_size)
        for e, row in zip(EXPERT, x, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mix", ["activation", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_mixing_is_the_loop_over_the_pool_with_its_gradients(kind, mix, scope):
    config, layer, pool = layer_and_pool(mix=mix, alpha_scope=scope, **KINDS[kind])
    x = draw(NUM_ROWS, 16)
    found = pooled_experts(pool(), x, SIZES, layer.spread_alpha(), mix=mix)
    expected = looped(config, pool, layer.alpha, x)
    close(found, expected)
    leaves = [x, layer.alpha, *pool.parameters()]
    gradient = torch.randn_like(found)
    close(
        torch.autograd.grad(found, leaves, gradient),
        torch.autograd.grad(expected, leaves, gradient),
    )


@pytest.mark.parametrize("mix", ["activation", "weight"])
def test_mixing_without_gradients_for_few_rows_is_the_same(mix):
    # One row: weight mixing then mixes the experts that are reached, and no others.
    config, layer, pool = layer_and_pool(mix=mix, alpha_scope="expert")
    x = torch.randn(NUM_ROWS, 16)
    expected = looped(config, pool, layer.alpha, x)[3]
    with torch.no_grad():
        one = torch.tensor([0, 0, 1, 0])
        found = pooled_experts(pool(), x[3:4], one, layer.spread_alpha(), mix=mix)
    close(found[0], expected)


# --- leaving out entries -------------------------------------------------------------------------


def set_alpha(model, rows):
    """α of each MoE layer from [P] values; all matrices and experts alike."""
    with torch.no_grad():
        for layer, row in zip(model.model.moe_layers(), rows, strict=True):
            values = torch.tensor(row)
            layer.alpha.copy_(values if layer.alpha.dim() == 1 else values[:, None])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mix", ["activation", "weight"])
@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_leaving_out_entries_is_setting_their_alpha_to_zero(preset, mix, scope):
    config = tiny(preset, num_hidden_layers=2, moe_every=1, pool_size=3, mix=mix, alpha_scope=scope)
    model, ids = build(config), torch.arange(12).view(2, 6)
    set_alpha(model, [[0.9, 0.4, -0.7], [0.3, -1.2, 0.4]])
    whole = model(ids).logits
    assert model.skip_entries(0.5) == [(0, 2), (1,)]
    found = model(ids).logits
    assert not torch.allclose(found, whole, atol=1e-3)
    set_alpha(model, [[0.9, 0.0, -0.7], [0.0, -1.2, 0.0]])
    assert model.skip_entries(0) == [(0, 1, 2)] * 2
    close(found, model(ids).logits)


def test_an_entry_runs_where_one_expert_needs_it():
    model = build(tiny(alpha_scope="expert"))
    set_alpha(model, [[0.5, 0.01]] * 2)
    with torch.no_grad():
        model.model.moe_layers()[0].alpha[1, 3] = -0.5
    assert model.skip_entries(0.1) == [(0, 1), (0,)]


def test_weight_mixing_keeps_an_entry_that_any_matrix_needs():
    # Activation mixing multiplies the entry's output by its last factor alone.
    for mix, kept in (("activation", (0,)), ("weight", (0, 1))):
        model = build(tiny(alpha_scope="matrix", mix=mix))
        set_alpha(model, [[0.5, 0.01]] * 2)
        with torch.no_grad():
            model.model.moe_layers()[0].alpha[1, 0] = 0.5
        assert model.skip_entries(0.1)[0] == kept


def test_a_threshold_that_empties_a_layer_names_it_and_changes_none():
    model = build(tiny())
    set_alpha(model, [[0.7, 0.3], [0.2, -0.25]])
    before = model.skip_entries(0.22)
    assert before == [(0, 1), (1,)]
    with pytest.raises(RecipeError, match=r"0\.5 empties MoE layer 1: its largest \|α\| is 0\.25"):
        model.skip_entries(0.5)
    assert [layer.kept for layer in model.model.moe_layers()] == [None, (1,)]


def test_layers_without_alpha_have_nothing_to_leave_out():
    assert build(tiny(sharing="none")).skip_entries(0.9) == [(0,), (0,)]
