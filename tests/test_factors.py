"""Laws of decomposed experts as values."""

import pytest
import torch
from torch.nn.functional import gelu, silu

from reference import factored as slow
from smelt import experts
from smelt.experts import gated
from smelt.factors import FactorBank, LowRankSparse, apply

G, F, D, R = 3, 6, 5, 2


def matrix(rows: int, columns: int, *, kept: int, dtype=torch.float32) -> LowRankSparse:
    ids = torch.randperm(G * rows)[:kept].sort().values.int()
    return LowRankSparse(
        torch.randn(G, rows, R, dtype=dtype),
        torch.randn(G, R, columns, dtype=dtype),
        torch.randn(kept, columns, dtype=dtype),
        ids,
    )


def bank(*, is_gated=True, has_bias=True, kept=5, dtype=torch.float32, seed=0) -> FactorBank:
    torch.manual_seed(seed)

    def bias(size: int):
        return torch.randn(G, size, dtype=dtype) if has_bias else None

    return FactorBank(
        up=matrix(F, D, kept=kept, dtype=dtype),
        down=matrix(D, F, kept=kept, dtype=dtype),
        gate=matrix(F, D, kept=kept, dtype=dtype) if is_gated else None,
        up_bias=bias(F),
        gate_bias=bias(F) if is_gated else None,
        down_bias=bias(D),
        activation=gated(silu if is_gated else gelu),
    )


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kept", [0, 5, 15])
def test_the_factors_are_the_experts_that_they_multiply_out_to(is_gated, has_bias, kept):
    factors = bank(is_gated=is_gated, has_bias=has_bias, kept=kept, dtype=torch.float64)
    x = torch.randn(7, D, dtype=torch.float64)  # in float32 the last bits are the machine's
    for expert in range(G):
        expected = experts.apply(factors.dense(), expert, x)
        torch.testing.assert_close(apply(factors, expert, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dense_is_the_obvious_sum(dtype):
    factors = bank(dtype=dtype)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in factors.tensors().items()}
    for name, found in factors.dense().tensors().items():
        if "bias" not in name:
            expected = slow.dense(wide, name).to(dtype)
            torch.testing.assert_close(found, expected)


def test_bytes_and_parameters_are_those_of_the_tensors():
    factors = bank(dtype=torch.bfloat16)
    tensors = factors.tensors()
    assert factors.num_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    floats = [t for t in tensors.values() if t.is_floating_point()]
    assert factors.num_params == sum(t.numel() for t in floats)
    assert factors.num_bytes == 2 * factors.num_params + 3 * 5 * 4  # a number of 4 bytes per row
    assert (factors.num_experts, factors.hidden_size, factors.model_size) == (G, F, D)
    assert (factors.up.rank, factors.up.shape, factors.down.shape) == (R, (G, F, D), (G, D, F))


def test_the_tensors_make_the_bank_again():
    factors = bank()
    again = FactorBank.of(factors.tensors(), factors.activation)
    assert again.tensors().keys() == factors.tensors().keys()
    assert all(again.tensors()[n] is t for n, t in factors.tensors().items())


@pytest.mark.parametrize("is_gated", [True, False])
def test_banks_joined_hold_all_their_experts(is_gated):
    parts = [bank(is_gated=is_gated, kept=kept, seed=kept) for kept in (0, 4, 7)]
    joined = FactorBank.joined(parts)
    assert joined.num_bytes == sum(part.num_bytes for part in parts)
    for name, found in joined.dense().tensors().items():
        expected = torch.cat([part.dense().tensors()[name] for part in parts])
        assert torch.equal(found, expected)


def test_shapes_are_known_without_weights():
    factors = bank()
    meta = FactorBank.of({n: t.to("meta") for n, t in factors.tensors().items()})
    assert meta.num_params == factors.num_params
    assert meta.dense().up.shape == (G, F, D)
