"""Laws of the processor's arithmetic during training."""

import pytest
import torch

from smelt.checkpoint.device import denormals_as_zero


def test_denormal_numbers_are_zero_inside_and_numbers_again_outside():
    small = torch.tensor([1e-30, 1.0])

    def product() -> float:
        return float((small * 1e-10)[0])  # 1e-40: less than the least normal number

    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot")
    assert product() > 0
    with denormals_as_zero():
        assert product() == 0
    assert product() > 0


def test_they_are_numbers_again_after_an_error():
    small = torch.tensor([1e-30])
    try:
        with denormals_as_zero():
            raise KeyError
    except KeyError:
        assert float(small * 1e-10) > 0
