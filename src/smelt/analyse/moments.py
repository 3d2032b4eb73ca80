"""Mean and scatter of gradients that pass by once, and the signal-to-noise ratio they give."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """The running mean of vectors, and the sum of their squared distances from it.

    The vectors are cut into units (U of them, any shape), each with moments of its own. One mean of
    the vectors' size is held, in float64, whatever their number. Equal vectors have a scatter of
    exactly 0.

    Source: Welford 1962.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Float[Tensor, "*U W"] | None = None
        self.scatter: Float[Tensor, "*U"] | None = None

    def add(self, vector: Float[Tensor, "*U W"]) -> None:
        """Take in one more vector per unit."""
        value = vector.detach().double()
        if self.mean is None or self.scatter is None:
            self.mean, self.scatter = torch.zeros_like(value), torch.zeros_like(value[..., 0])
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.scatter += (step * (value - self.mean)).sum(-1)

    def add_zero(self, like: Float[Tensor, "*U W"]) -> None:
        """Take in a vector of zeros: a micro-batch that sent no gradient here."""
        self.add(torch.zeros_like(like))


@dataclass(frozen=True)
class Signal:
    """Gradients of M micro-batches as sums over the values of a unit; they add up over units.

    With g_i the gradient of micro-batch i and ḡ the mean of all M:
    `mean_square` = ‖ḡ‖², `scatter` = Σ_i ‖g_i − ḡ‖².
    """

    count: int  # M
    mean_square: Float[Tensor, "*U"]
    scatter: Float[Tensor, "*U"]

    @classmethod
    def of(cls, *moments: Moments) -> "Signal":
        """What moments of the same units, of several tensors, say together."""
        squares, scatters = [], []
        for one in moments:
            assert one.mean is not None and one.scatter is not None
            squares.append(one.mean.square().sum(-1))
            scatters.append(one.scatter)
        counts = {one.count for one in moments}
        assert len(counts) == 1, f"tensors of one part saw {counts} micro-batches"
        return cls(counts.pop(), torch.stack(squares).sum(0), torch.stack(scatters).sum(0))

    def pooled(self) -> "Signal":
        """All units as one."""
        return Signal(self.count, self.mean_square.sum(), self.scatter.sum())

    @property
    def norm(self) -> Float[Tensor, "*U"]:
        """√(mean ‖g_i‖²): how large the gradient of one micro-batch is."""
        return (self.mean_square + self.scatter / self.count).sqrt()

    @property
    def mean_norm(self) -> Float[Tensor, "*U"]:
        """‖ḡ‖."""
        return self.mean_square.sqrt()

    @property
    def noise(self) -> Float[Tensor, "*U"]:
        """Unbiased: tr Σ̂ = scatter / (M − 1), the variance of one micro-batch's gradient."""
        return self.scatter / (self.count - 1)

    @property
    def signal(self) -> Float[Tensor, "*U"]:
        """Unbiased: ‖ḡ‖² − tr Σ̂ / M, an estimate of ‖E g‖²; below 0 where noise is all there is."""
        return self.mean_square - self.noise / self.count

    @property
    def snr(self) -> Float[Tensor, "*U"]:
        """signal / noise of one micro-batch: inf where all gradients are equal, nan where all 0.

        It grows in proportion to the tokens of a micro-batch.
        """
        return self.signal / self.noise

    @property
    def plain_snr(self) -> Float[Tensor, "*U"]:
        """‖ḡ‖² / mean ‖g_i − ḡ‖², which pure noise makes 1 / (M − 1) on average and not 0."""
        return self.mean_square / (self.scatter / self.count)

    def numbers(self) -> dict[str, Any]:
        """Every figure as plain numbers, nested lists where there are several units."""
        return {
            name: numbers(getattr(self, name))
            for name in ("norm", "mean_norm", "signal", "noise", "snr", "plain_snr")
        }


def numbers(value: Tensor) -> Any:
    """A tensor as nested lists of floats with six significant digits."""
    return _rounded(value.tolist())


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    return value
