import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.samples import KINDS, outputs, random_bank, repeated, shuffles
from smelt.compress.align import Aligner
from smelt.compress.merge import MERGES, coefficients, keep, merge_groups
from smelt.experts import ExpertBank, combine, permute_hidden

LABELS = torch.tensor([0, 1, 0, -1, 1, 0, 2])


def same(a: ExpertBank, b: ExpertBank) -> bool:
    return all(torch.equal(x, b.tensors()[name]) for name, x in a.tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_the_weighted_sum_of_the_reordered_members(kind: str) -> None:
    bank, order = random_bank(kind, E=7), shuffles(7, 6)
    weights = MERGES["usage"](LABELS, torch.rand(7))
    merged = merge_groups(bank, LABELS, weights, order)
    expected = combine(permute_hidden(bank, order), coefficients(LABELS, weights))
    expected.up[2], expected.down[2] = bank.up[6], bank.down[6]  # a group of one stays as it is
    if expected.gate is not None:
        expected.gate[2] = bank.gate[6]
    for name in ("up_bias", "gate_bias"):
        if getattr(expected, name) is not None:
            getattr(expected, name)[2] = getattr(bank, name)[6]
    for name, tensor in merged.tensors().items():
        torch.testing.assert_close(tensor, expected.tensors()[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_copies_of_one_expert_gives_it_back(kind: str, dtype: torch.dtype) -> None:
    bank = repeated(random_bank(kind, dtype=dtype), 5)
    labels = torch.tensor([0, 0, 1, 0, 1])
    merged = merge_groups(bank, labels, MERGES["usage"](labels, torch.rand(5)))
    for name, tensor in merged.tensors().items():
        first = bank.tensors()[name][:2]
        if dtype == torch.bfloat16:  # the rounding of the float32 sum is lost in the cast
            assert torch.equal(tensor, first)
        torch.testing.assert_close(tensor, first)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_reordered_copies_of_one_expert_gives_it_back(kind: str) -> None:
    bank = repeated(random_bank(kind, F=16, D=12), 5)
    mixed = permute_hidden(bank, shuffles(5, 16))
    labels, dominants = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 1])
    with Aligner() as aligner:
        order = aligner.orders(mixed, labels, dominants)
    merged = merge_groups(mixed, labels, MERGES["mean"](labels, torch.ones(5)), order)
    for name, tensor in merged.tensors().items():
        torch.testing.assert_close(tensor, mixed.tensors()[name][:2])
    x = torch.randn(9, 12)
    torch.testing.assert_close(outputs(merged, x), outputs(bank, x)[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_groups_as_experts_leaves_the_bank_bit_identical(kind: str) -> None:
    bank = random_bank(kind, dtype=torch.bfloat16)
    bank.up[0, 0, 0], bank.up[0, 0, 1] = -0.0, float("inf")
    labels = torch.arange(5)
    for weigh in MERGES.values():
        merged = merge_groups(bank, labels, weigh(labels, torch.zeros(5)), shuffles(5, 6))
        assert same(merged, bank)
        assert torch.signbit(merged.up[0, 0, 0])


def test_pruning_copies_the_kept_experts_bit_for_bit() -> None:
    bank = random_bank("biased", dtype=torch.bfloat16)
    labels, kept = torch.tensor([-1, 0, -1, 1, -1]), torch.tensor([1, 3])
    weights = MERGES["usage"](labels, torch.rand(5))
    assert weights.tolist() == [0, 1, 0, 1, 0]
    assert same(merge_groups(bank, labels, weights), keep(bank, kept))


labellings = st.lists(st.integers(0, 3), min_size=4, max_size=10).map(
    lambda drawn: torch.tensor([0, 1, 2, 3, *drawn])
)


@settings(deadline=None)
@given(labellings, st.integers(1, 10**6), st.data())
def test_weights_sum_to_one_and_their_scale_does_not_matter(
    labels: torch.Tensor, scale: int, data: st.DataObject
) -> None:
    usage = torch.tensor([float(data.draw(st.integers(0, 5))) for _ in labels])
    weights = MERGES["usage"](labels, usage)
    torch.testing.assert_close(coefficients(labels, weights).sum(1), torch.ones(4).double())
    torch.testing.assert_close(MERGES["usage"](labels, usage * scale), weights)


def test_a_group_no_token_reached_is_the_plain_mean_and_not_the_zero_expert() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1])
    usage = torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0])
    weights = MERGES["usage"](labels, usage)
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.25, 1 / 3, 1 / 3, 1 / 3]).double())


def test_rarely_used_experts_do_not_shrink() -> None:
    labels, usage = torch.zeros(2, dtype=torch.int64), torch.tensor([1.0, 1.0]) / 2**40
    assert MERGES["usage"](labels, usage).sum() == 1
    bank = repeated(random_bank("gated"), 2)
    merged = merge_groups(bank, labels, MERGES["usage"](labels, usage))
    torch.testing.assert_close(merged.up[0], bank.up[0])


def test_the_bank_is_cast_once() -> None:
    # Six bf16 members whose sum in bf16 loses the small ones.
    up = torch.full((6, 1, 1), 2.0**-9, dtype=torch.bfloat16)
    up[0] = 1.0
    bank = ExpertBank(up=up, down=up.clone())
    labels = torch.zeros(6, dtype=torch.int64)
    merged = merge_groups(bank, labels, torch.ones(6))
    assert merged.up.item() == torch.tensor(1 + 5 * 2.0**-9).bfloat16().item() != 1.0
