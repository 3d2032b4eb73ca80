"""Laws of what is said about layers: α, CKA, outputs, routings."""

import math

import pytest
import torch

from smelt.analyse import maps, probe
from smelt.analyse.maps import distance_from_one_hot, effective_rank, largest_share
from smelt.analyse.probe import similarity, weight_cosine
from smelt.analyse.similarity import Contingency, LinearCKA, OutputCosine
from smelt.samoe.pool import mixed


def rotation(size):
    return torch.linalg.qr(torch.randn(size, size)).Q


# --- α -------------------------------------------------------------------------------------------


def test_one_hot_alpha_by_equal_groups_has_the_rank_of_the_groups():
    alpha = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2, 2])).float()
    assert effective_rank(alpha) == pytest.approx(3)


def test_one_hot_alpha_by_uneven_groups_has_the_closed_form():
    alpha = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 0, 1])).float()
    share = torch.tensor([2.0, 1.0]) / 3  # singular values: roots of the groups' sizes
    assert effective_rank(alpha) == pytest.approx(float((-share * share.log()).sum().exp()))


def test_rows_that_are_multiples_of_one_have_rank_one():
    assert effective_rank(torch.outer(torch.randn(5), torch.randn(3))) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(4, 2)) == 0


def test_rank_does_not_depend_on_scale_or_rotation():
    alpha = torch.randn(6, 3)
    expected = effective_rank(alpha)
    assert effective_rank(-7 * alpha) == pytest.approx(expected)
    assert effective_rank(alpha @ rotation(3)) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(alpha[[3, 1, 0, 5, 4, 2]]) == pytest.approx(expected)


def test_one_hot_rows_are_at_distance_zero_and_even_ones_farthest():
    rows = torch.tensor([[0.0, -3.0, 0.0], [0.5, 0.5, -0.5], [3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    distance, share = distance_from_one_hot(rows), largest_share(rows)
    expected = [0, 1 - 1 / math.sqrt(3), 1 - 4 / 5]
    assert distance[:3].tolist() == pytest.approx(expected, abs=1e-6)
    assert share[:3].tolist() == pytest.approx([1, 1 / 3, 4 / 7])
    assert distance[3].isnan() and share[3].isnan()
    torch.testing.assert_close(distance_from_one_hot(-2 * rows)[:3], distance[:3])


@pytest.mark.parametrize(("scope", "columns"), [("layer", 1), ("expert", 4), ("matrix", 2)])
def test_maps_hold_alpha_as_the_layers_have_it(model, scope, columns):
    base = model(alpha_scope=scope).model
    values = maps.alpha_of(base)
    assert values.shape == (3, 2, columns) and len(maps.columns(base)) == columns
    for layer, row in zip(base.moe_layers(), values, strict=True):
        torch.testing.assert_close(row, layer.alpha.detach().double().reshape(2, columns))


def test_models_without_alpha_have_no_map_of_it(model):
    assert maps.alpha_of(model(sharing="none").model) is None
    assert maps.alpha_of(model(sharing="dense").model) is None


# --- CKA -----------------------------------------------------------------------------------------


def cka_of(*features, chunks=1):
    found = LinearCKA()
    for part in torch.stack(features).chunk(chunks, 1):
        found.add(part)
    return found.result()


def slow_cka(x, y):
    """By the N × N kernels, centred on both sides. Source: Kornblith et al. 2019, Eq. 3."""
    N = len(x)
    centre = torch.eye(N, dtype=torch.float64) - 1 / N
    k, m = (centre @ z.double() @ z.double().T @ centre for z in (x, y))
    return float((k * m).sum() / (k.norm() * m.norm()))


def test_cka_is_the_ratio_of_centred_kernels():
    x, y = torch.randn(50, 6) + 3, torch.randn(50, 6)
    y = y + 0.5 * x
    found = cka_of(x, y)
    assert float(found[0, 1]) == pytest.approx(slow_cka(x, y), rel=1e-4)
    assert found.diagonal().tolist() == pytest.approx([1, 1])
    assert torch.equal(found, found.T)


def test_cka_of_features_rotated_scaled_and_shifted_is_one():
    x = torch.randn(80, 5)
    found = cka_of(x, -3 * x @ rotation(5) + torch.randn(5))
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-5)


def test_cka_does_not_depend_on_how_the_text_is_cut():
    features = torch.randn(3, 90, 4) + 10
    features[1] += features[0]
    whole = cka_of(*features)
    for chunks in (2, 7):
        torch.testing.assert_close(cka_of(*features, chunks=chunks), whole, rtol=1e-5, atol=1e-6)


def test_cka_of_unrelated_features_is_near_its_floor():
    N, D = 2000, 20
    found = float(cka_of(torch.randn(N, D), torch.randn(N, D))[0, 1])
    assert found == pytest.approx(D / (N + D), rel=0.3)


# --- outputs -------------------------------------------------------------------------------------


def test_cosine_of_outputs_is_a_mean_over_tokens_that_both_layers_map_somewhere():
    x = torch.randn(6, 4)
    found = OutputCosine()
    found.add(torch.stack([x, -2 * x, torch.zeros_like(x)]))
    half = torch.cat([x[:3], -x[3:]])
    found.add(torch.stack([x, half, x]))
    expected = (6 * -1 + 3 * 1 + 3 * -1) / 12
    assert float(found.result()[0, 1]) == pytest.approx(expected, abs=1e-6)
    assert float(found.result()[0, 2]) == pytest.approx(1, abs=1e-6)


def test_layers_with_the_same_experts_and_router_are_the_same_function(model, micro_batches):
    alike = similarity(model(sharing="all", shared_router=True), micro_batches(2))
    assert alike["output_cosine"] == [[pytest.approx(1, abs=1e-5)] * 3] * 3
    apart = similarity(model(sharing="none"), micro_batches(2))
    assert abs(apart["output_cosine"][0][1]) < 0.9
    assert [apart["output_cosine"][i][i] for i in range(3)] == pytest.approx([1] * 3, abs=1e-5)


def test_every_layer_runs_its_own_experts_on_every_layers_inputs(model, micro_batches):
    net, (batch,) = model(sharing="groups"), micro_batches(1)
    layers, inputs = net.model.moe_layers(), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for layer in layers
    ]
    with torch.no_grad():
        net(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    pools = [net.model.pools[0](), net.model.pools[0](), None]  # layers 0 and 1 share
    expected = OutputCosine()
    with torch.no_grad():
        for x in inputs:
            made = [f(x, pool, None, None).output for f, pool in zip(layers, pools, strict=True)]
            expected.add(torch.stack(made).flatten(1, 2))
    found = torch.tensor(similarity(net, [batch])["output_cosine"])
    torch.testing.assert_close(found.double(), expected.result(), rtol=1e-4, atol=1e-5)


def test_the_cosine_of_weights_is_that_of_the_mixed_down_projections(model):
    net = model(mix="weight", alpha_scope="expert", pool_size=3)
    layers, pool = net.model.moe_layers(), net.model.pools[0]()
    vectors = [mixed(pool, l.spread_alpha(), (0, 1, 2)).down.flatten() for l in layers]  # noqa: E741
    unit = torch.nn.functional.normalize(torch.stack(vectors), dim=1).double()
    torch.testing.assert_close(weight_cosine(net.model), unit @ unit.T, rtol=1e-4, atol=1e-5)


def test_the_cosine_of_weights_side_by_side_weighs_every_entry_apart(model):
    net = model(pool_size=2)
    down = net.model.pools[0].down.detach()
    alphas = [layer.alpha.detach() for layer in net.model.moe_layers()]
    vectors = [(down * a.repeat_interleave(16)).flatten() for a in alphas]
    unit = torch.nn.functional.normalize(torch.stack(vectors), dim=1).double()
    torch.testing.assert_close(weight_cosine(net.model), unit @ unit.T, rtol=1e-4, atol=1e-5)
    assert weight_cosine(model(sharing="none").model) is None


# --- routings ------------------------------------------------------------------------------------


def table_of(first, second, experts=4):
    found = Contingency(experts, experts)
    found.add(first, second)
    return found


def test_a_routing_tells_all_of_itself_however_experts_are_numbered():
    choice = torch.randint(4, (500,))
    permuted = torch.tensor([2, 0, 3, 1])[choice]
    assert table_of(choice, choice).mutual_information() == pytest.approx(1)
    assert table_of(choice, permuted).mutual_information() == pytest.approx(1)
    assert table_of(choice, choice).same()[0] == 1
    assert table_of(choice, permuted).same()[0] == 0


def test_unrelated_routings_share_nothing():
    found = [table_of(torch.randint(8, (600,)), torch.randint(8, (600,)), 8) for _ in range(30)]
    corrected = sum(one.mutual_information() for one in found) / 30
    assert abs(corrected) < 0.005  # uncorrected: (8 − 1)² / (2 · 600 · log 8) = 0.02
    same, chance = found[0].same()
    assert same == pytest.approx(chance, abs=0.05) and chance == pytest.approx(1 / 8, abs=0.01)


def test_a_table_counts_the_first_layer_in_rows_and_the_second_in_columns():
    table = Contingency(2, 3)
    table.add(torch.tensor([0, 1, 1, 1]), torch.tensor([2, 0, 0, 2]))
    assert table.counts.tolist() == [[0, 0, 1], [2, 0, 1]]


def test_information_is_symmetric_and_undefined_for_one_expert():
    a, b = torch.randint(4, (200,)), torch.randint(2, (200,))
    b = torch.where(torch.rand(200) < 0.5, a, b)
    assert table_of(a, b).mutual_information() == pytest.approx(table_of(b, a).mutual_information())
    assert math.isnan(table_of(a, torch.zeros_like(a)).mutual_information())


def test_tables_do_not_depend_on_how_the_text_is_cut():
    a, b = torch.randint(4, (300,)), torch.randint(4, (300,))
    cut = Contingency(4, 4)
    for part in (slice(0, 7), slice(7, 300)):
        cut.add(a[part], b[part])
    assert torch.equal(cut.counts, table_of(a, b).counts)


def test_the_probe_counts_every_choice_of_every_layer(model, micro_batches):
    alike = similarity(model(num_experts_per_tok=2), micro_batches(3))
    assert alike["num_tokens"] == 3 * 2 * 24
    assert [sum(layer) for layer in alike["tokens_per_expert"]] == [2 * alike["num_tokens"]] * 3
    L = len(alike["cka"])
    assert L == 7 and [alike["cka"][i][i] for i in range(L)] == pytest.approx([1] * L, abs=1e-5)


def test_what_would_need_too_much_memory_is_left_out_and_said(model, micro_batches, monkeypatch):
    monkeypatch.setattr(probe, "WIDEST", 100)
    alike = similarity(model(), micro_batches(2))
    assert "cka" not in alike and "112 is beyond 100" in alike["left_out"][0]


def test_a_dense_model_has_hidden_states_only(model, micro_batches):
    alike = similarity(model(sharing="dense"), micro_batches(2))
    assert "cka" in alike
    assert not {"output_cosine", "mutual_information", "tokens_per_expert"} & alike.keys()
