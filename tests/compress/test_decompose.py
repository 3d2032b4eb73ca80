"""Laws of the decomposition: what is nearest, which rows stay, which rank a budget buys."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.compress.decompose import (
    RIDGE,
    choose_rows,
    decompose,
    pack,
    residual_scores,
    row_scores,
    spectrum,
    stable_rank,
    truncated_svd,
)
from smelt.compress.grams import grams_of
from smelt.compress.ranks import rank_cost, rank_for_bytes, rank_for_energy, ranks_under_budget
from smelt.errors import PlanError
from smelt.experts import ExpertBank, hidden

SHAPES = [(9, 6), (6, 9), (7, 7), (1, 5)]


def weights(rows, columns, *, experts=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, rows, columns, generator=generator, dtype=dtype)


def second_moments(size, *, tokens, experts=3, seed=1):
    """Grams of few tokens whose directions differ in size by a hundred: rank `tokens`."""
    x = weights(tokens, size, experts=experts, dtype=torch.float64, seed=seed)
    x = x * torch.logspace(0, -2, size, dtype=torch.float64)
    return x.mT @ x / tokens


def with_ridge(gram, ridge):
    return gram + ridge * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(
        gram.shape[1], dtype=gram.dtype
    )


def loss(weight, u, v, gram):
    """‖(W − U V) L‖² with L Lᵀ the Gram, by expert."""
    rest = weight.double() - u.double() @ v.double()
    return torch.einsum("goi,gij,goj->g", rest, gram.double(), rest)


# --- the nearest low-rank matrix -----------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_plain_svd_is_the_nearest(shape, dtype):
    weight = weights(*shape, dtype=dtype)
    for rank in range(1, min(shape) + 1):
        u, v = truncated_svd(weight, rank)
        assert u.dtype == v.dtype == dtype
        a, s, b = torch.linalg.svd(weight.double(), full_matrices=False)
        expected = (a[..., :rank] * s[:, None, :rank]) @ b[:, :rank]
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        found = u.double() @ v.double()
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_root_sigma_lies_in_both_factors():
    weight = weights(9, 6, dtype=torch.float64)
    u, v = truncated_svd(weight, 4)
    sigma = torch.linalg.svdvals(weight)[:, :4]
    torch.testing.assert_close(u.mT @ u, torch.diag_embed(sigma))
    torch.testing.assert_close(v @ v.mT, torch.diag_embed(sigma))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.integers(0, 100),
    st.integers(1, 12),
    st.sampled_from([1e-6, RIDGE, 1e-1]),
)
def test_the_data_aware_svd_is_optimal_and_never_worse_than_the_plain(shape, seed, tokens, ridge):
    weight = weights(*shape, dtype=torch.float64, seed=seed)
    gram = second_moments(shape[1], tokens=tokens, seed=seed + 1)  # often rank-deficient
    seen = with_ridge(gram, ridge)
    for rank in range(1, min(shape) + 1):
        own = loss(weight, *truncated_svd(weight, rank, gram, ridge=ridge), seen)
        plain = loss(weight, *truncated_svd(weight, rank), seen)
        left = torch.linalg.svdvals(weight @ torch.linalg.cholesky(seen))[:, rank:].square().sum(1)
        total = loss(weight, torch.zeros(3, shape[0], 1), torch.zeros(3, 1, shape[1]), seen)
        assert (own <= plain + 1e-9 * total).all()
        torch.testing.assert_close(own, left, rtol=1e-6, atol=1e-9 * float(total.max()))


def test_the_data_aware_svd_is_better_where_the_tokens_are():
    weight, gram = weights(12, 8, seed=3), second_moments(8, tokens=20)
    own = loss(weight, *truncated_svd(weight, 3, gram), gram)
    assert (own < 0.9 * loss(weight, *truncated_svd(weight, 3), gram)).all()


def test_a_white_gram_is_the_plain_svd():
    weight = weights(9, 6, dtype=torch.float64)
    found = truncated_svd(weight, 3, torch.eye(6).expand(3, 6, 6))
    expected = truncated_svd(weight, 3)
    torch.testing.assert_close(found[0] @ found[1], expected[0] @ expected[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_expert_that_no_token_reached_gets_the_plain_svd(shape):
    weight = weights(*shape)
    gram = second_moments(shape[1], tokens=9)
    gram[1] = 0.0
    u, v = truncated_svd(weight, 1, gram)
    plain = truncated_svd(weight, 1)
    assert torch.equal(u[1], plain[0][1]) and torch.equal(v[1], plain[1][1])
    assert u.isfinite().all() and v.isfinite().all()


@pytest.mark.parametrize("gram", [None, "few tokens"])
def test_matrices_of_low_rank_come_back_exactly_and_zeros_stay_zero(gram):
    weight = weights(9, 2, dtype=torch.float64) @ weights(2, 6, dtype=torch.float64)
    weight[1] = 0.0
    seen = None if gram is None else second_moments(6, tokens=3)
    for rank in (2, 4, 6):
        u, v = truncated_svd(weight, rank, seen)
        torch.testing.assert_close(u @ v, weight, atol=1e-7, rtol=1e-7)
        assert u.isfinite().all() and v.isfinite().all()


def test_the_same_weights_give_the_same_bytes():
    weight, gram = weights(20, 12), second_moments(12, tokens=30)
    for first, again in zip(
        truncated_svd(weight, 5, gram), truncated_svd(weight.clone(), 5, gram), strict=True
    ):
        assert torch.equal(first, again)


def test_one_expert_alone_is_that_expert_among_others():
    weight, gram = weights(9, 6), second_moments(6, tokens=9)
    u, v = truncated_svd(weight, 3, gram)
    for g in range(3):
        own = truncated_svd(weight[g : g + 1], 3, gram[g : g + 1])
        assert torch.equal(own[0][0], u[g]) and torch.equal(own[1][0], v[g])


@pytest.mark.parametrize("rank", [0, 7, -1])
def test_a_rank_that_no_matrix_can_have_is_refused(rank):
    with pytest.raises(PlanError, match="ranks 1 to 6"):
        truncated_svd(weights(9, 6), rank)


def test_a_gram_that_is_not_finite_is_refused():
    gram = second_moments(6, tokens=9)
    gram[2, 0, 0] = torch.nan
    with pytest.raises(PlanError, match="NaN or Inf"):
        truncated_svd(weights(9, 6), 2, gram)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectra_are_singular_values(shape):
    weight = weights(*shape, dtype=torch.float64)
    torch.testing.assert_close(spectrum(weight), torch.linalg.svdvals(weight))
    gram = second_moments(shape[1], tokens=4)
    white = weight @ torch.linalg.cholesky(with_ridge(gram, RIDGE))
    torch.testing.assert_close(spectrum(weight, gram), torch.linalg.svdvals(white))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3), (40, 30)], ids=str)
def test_the_stable_rank_is_a_ratio_of_norms(shape):
    weight = weights(*shape)
    values = torch.linalg.svdvals(weight.double())
    expected = values.square().sum(1) / values[:, 0].square()
    torch.testing.assert_close(stable_rank(weight), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stable_rank(1e-3 * weight), expected, rtol=1e-5, atol=1e-5)


def test_the_stable_rank_counts_equal_directions():
    weight = torch.zeros(3, 8, 5)
    weight[0, :4, :4] = torch.eye(4)
    weight[1, 0, 0] = 2.0
    torch.testing.assert_close(stable_rank(weight), torch.tensor([4.0, 1.0, 0.0]).double())


# --- rows ----------------------------------------------------------------------------------------


def test_a_rows_score_is_the_mean_square_that_its_output_loses():
    rest, x = weights(9, 6), weights(50, 6, seed=4)
    gram = x.mT.double() @ x.double() / 50
    lost = torch.einsum("goi,gni->gno", rest.double(), x.double()).square().mean(1) / 6
    torch.testing.assert_close(row_scores(rest, gram), lost)
    torch.testing.assert_close(row_scores(rest), rest.double().square().mean(2))
    white = torch.eye(6).expand(3, 6, 6)
    torch.testing.assert_close(row_scores(rest, white), row_scores(rest))


def test_scores_expert_by_expert_are_those_of_the_whole_rest():
    weight, gram = weights(9, 6), second_moments(6, tokens=9)
    u, v = truncated_svd(weight, 2)
    rest = weight.double() - u.double() @ v.double()
    torch.testing.assert_close(residual_scores(weight, u, v, gram), row_scores(rest, gram))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9)), min_size=1),
    st.floats(0, 1),
    st.integers(0, 100),
)
def test_one_threshold_keeps_the_share_of_entries(shapes, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(g, rows, generator=generator) for g, rows, _ in shapes]
    lengths = [length for *_, length in shapes]
    masks = choose_rows(scores, lengths, share)
    kept = sum(int(m.sum()) * n for m, n in zip(masks, lengths, strict=True))
    total = sum(s.numel() * n for s, n in zip(scores, lengths, strict=True))
    inside = [s[m] for s, m in zip(scores, masks, strict=True)]
    outside = [s[~m] for s, m in zip(scores, masks, strict=True)]
    assert kept <= share * total * (1 + 1e-9)
    if any(len(o) for o in outside):  # the next row would have been too much
        assert kept + max(lengths) > share * total
    if any(len(i) for i in inside) and any(len(o) for o in outside):
        assert torch.cat(inside).min() >= torch.cat(outside).max()


def test_long_rows_use_up_more_of_the_share():
    masks = choose_rows([torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0, 0.5]])], [10, 5], 20 / 30)
    assert [m.tolist() for m in masks] == [[[True, True]], [[False, False]]]
    masks = choose_rows([torch.tensor([[3.0, 0.1]]), torch.tensor([[1.0, 0.5]])], [10, 5], 20 / 30)
    assert [m.tolist() for m in masks] == [[[True, False]], [[True, True]]]


def test_ties_go_to_the_earlier_matrix_and_the_lower_row():
    masks = choose_rows([torch.ones(2, 3), torch.ones(1, 4)], [5, 5], 0.4)
    assert masks[0].flatten().tolist() == [True] * 4 + [False] * 2
    assert not masks[1].any()


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (1.0, 10), (0.3, 3)])
def test_a_share_that_rows_can_meet_is_met(share, kept):
    assert int(choose_rows([torch.rand(1, 10)], [7], share)[0].sum()) == kept


def test_bad_scores_and_shares_are_refused():
    with pytest.raises(PlanError, match="NaN"):
        choose_rows([torch.tensor([[1.0, torch.nan]])], [3], 0.5)
    for share in (-0.1, 1.1):
        with pytest.raises(PlanError, match="between 0 and 1"):
            choose_rows([torch.ones(1, 2)], [3], share)


# --- ranks ---------------------------------------------------------------------------------------


def test_the_rank_by_energy_is_the_least_that_keeps_it():
    sigma = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    assert [rank_for_energy(sigma, s) for s in (0.01, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    for share in (0, 1.01):
        with pytest.raises(PlanError, match="energy"):
            rank_for_energy(sigma, share)
    with pytest.raises(PlanError, match="not finite"):
        rank_for_energy(sigma * torch.nan, 0.5)


def test_the_rank_by_bytes_is_the_largest_that_fits():
    cost = rank_cost(3, 9, 6, itemsize=4)
    assert cost == 3 * (9 + 6) * 4
    assert [rank_for_bytes(cost, budget, 6) for budget in (180, 359, 360, 10**9)] == [1, 1, 2, 6]
    with pytest.raises(PlanError, match="rank 1 alone needs 180"):
        rank_for_bytes(cost, 179, 6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1.2))
def test_ranks_under_a_budget_are_best_up_to_one_step(seed, share):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 4), (1, 3), (3, 5)]
    spectra = [
        torch.rand(*size, generator=generator).sort(1, descending=True).values for size in sizes
    ]
    costs = torch.randint(1, 9, (3,), generator=generator).tolist()
    most = sum(c * n for c, (_, n) in zip(costs, sizes, strict=True))
    budget = max(sum(costs), int(share * most))
    ranks = ranks_under_budget(spectra, costs, budget)

    def value(chosen):
        return sum(
            float(s[:, :r].double().square().sum()) for s, r in zip(spectra, chosen, strict=True)
        )

    def cost(chosen):
        return sum(c * r for c, r in zip(costs, chosen, strict=True))

    every = itertools.product(*(range(1, n + 1) for _, n in sizes))
    best = max(value(r) for r in every if cost(r) <= budget)
    step = max(float(s[:, 1:].square().sum(0).max()) for s in spectra)
    assert cost(ranks) <= budget
    assert best - step <= value(ranks) <= best + 1e-9
    if budget >= most:
        assert ranks == [n for _, n in sizes]


def test_a_budget_below_rank_one_everywhere_is_refused():
    with pytest.raises(PlanError, match="rank 1 of every matrix alone needs 7"):
        ranks_under_budget([torch.ones(1, 3), torch.ones(1, 3)], [3, 4], 6)
    assert ranks_under_budget([torch.ones(1, 3), torch.ones(1, 3)], [3, 4], 7) == [1, 1]


# --- a layer -------------------------------------------------------------------------------------


def bank(*, is_gated=True, has_bias=True, dtype=torch.float32):
    torch.manual_seed(0)

    def bias(size):
        return torch.randn(3, size, dtype=dtype) if has_bias else None

    return ExpertBank(
        up=torch.randn(3, 8, 6, dtype=dtype),
        down=torch.randn(3, 6, 8, dtype=dtype),
        gate=torch.randn(3, 8, 6, dtype=dtype) if is_gated else None,
        up_bias=bias(8),
        gate_bias=bias(8) if is_gated else None,
        down_bias=bias(6),
    )


def test_grams_are_second_moments_of_what_each_group_reads():
    experts = bank()
    x = torch.randn(40, 6)
    groups = torch.randint(-1, 4, (40, 2))  # 3: a slot that does nothing
    groups[:5] = 1  # the same group twice: seen once
    grams = grams_of(experts, x, groups)
    assert list(grams) == ["gate", "up", "down"]
    for g in range(3):
        own = torch.stack([t for t, ids in zip(x, groups, strict=True) if g in ids.tolist()])
        torch.testing.assert_close(grams["up"][g], (own.T @ own).double() / 40)
        h = hidden(experts, g, own)
        torch.testing.assert_close(grams["down"][g], (h.T @ h).double() / 40, rtol=1e-4, atol=1e-5)
        assert grams["up"][g].dtype == torch.float64
    assert len(grams["gate"]) == 3 and len(list(grams["gate"])) == 3


def test_grams_do_not_depend_on_the_chunks(monkeypatch):
    experts, x, groups = bank(), torch.randn(50, 6), torch.randint(0, 3, (50, 2))
    whole = [g.clone() for g in grams_of(experts, x, groups)["down"]]
    monkeypatch.setattr("smelt.compress.grams._TOKENS_AT_ONCE", 3)
    for a, b in zip(grams_of(experts, x, groups)["down"], whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_full_rank_or_every_row_is_the_bank_itself(is_gated, has_bias):
    experts = bank(is_gated=is_gated, has_bias=has_bias)
    names = ["gate", "up", "down"] if is_gated else ["up", "down"]
    for rank, share in ((6, 0.0), (2, 1.0)):
        found = decompose(experts, dict.fromkeys(names, rank), share).dense()
        assert found.tensors().keys() == experts.tensors().keys()
        for name, tensor in experts.tensors().items():
            torch.testing.assert_close(found.tensors()[name], tensor, atol=1e-5, rtol=1e-5)


def test_kept_rows_are_exact_and_the_others_low_rank():
    weight = weights(9, 6)
    u, v = truncated_svd(weight, 2)
    mask = torch.rand(3, 9) < 0.3
    mask[1] = False
    packed = pack(weight, u, v, mask)
    assert packed.row_ids.dtype == torch.int32
    assert packed.row_ids.tolist() == mask.flatten().nonzero().flatten().tolist()
    found = packed.dense()
    torch.testing.assert_close(found[mask], weight[mask], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[~mask], (u @ v)[~mask])


def test_rows_make_up_for_what_factors_lose_in_bfloat16():
    weight = weights(9, 6, dtype=torch.bfloat16)
    u, v = truncated_svd(weight, 2)
    packed = pack(weight, u, v, torch.ones(3, 9, dtype=torch.bool))
    torch.testing.assert_close(packed.dense(), weight, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("is_aware", [True, False])
def test_a_share_of_a_layer_is_one_threshold_over_its_matrices(is_aware):
    experts = bank()
    grams = grams_of(experts, torch.randn(60, 6), torch.randint(0, 3, (60, 2)))
    grams = grams if is_aware else None
    ranks = {"gate": 1, "up": 2, "down": 3}
    found = decompose(experts, ranks, 0.25, grams)
    assert {m: f.rank for m, f in found.matrices().items()} == ranks
    kept = sum(f.rows.numel() for f in found.matrices().values())
    total = 3 * 3 * 48
    assert 0.25 * total - 8 < kept <= 0.25 * total
    masks = {}
    for name, factors in found.matrices().items():
        mask = torch.zeros(3 * factors.shape[1], dtype=torch.bool)
        mask[factors.row_ids.long()] = True
        masks[name] = mask.view(3, -1)
    again = decompose(experts, ranks, masks, grams)
    assert all(torch.equal(t, again.tensors()[n]) for n, t in found.tensors().items())


def test_more_rank_and_more_rows_lose_less():
    experts = bank(has_bias=False)

    def lost(rank, share):
        found = decompose(experts, {"gate": rank, "up": rank, "down": rank}, share).dense()
        pairs = zip(experts.tensors().values(), found.tensors().values(), strict=True)
        return sum(float((a - b).square().sum()) for a, b in pairs)

    by_rank = [lost(rank, 0.1) for rank in (1, 2, 4, 6)]
    by_rows = [lost(2, share) for share in (0.0, 0.1, 0.5, 1.0)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rows == sorted(by_rows, reverse=True)
