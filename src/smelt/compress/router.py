"""The G router rows of a stock checkpoint, row by row from the E rows of the original."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rows = Callable[[Float[Tensor, "E ..."], Int[Tensor, " E"], Int[Tensor, " G"]], Tensor]


def dominant_rows(
    tensor: Float[Tensor, "E ..."], labels: Int[Tensor, " E"], dominants: Int[Tensor, " G"]
) -> Float[Tensor, "G ..."]:
    """The dominant experts' own rows, bit for bit. For weight, bias and selection bias alike."""
    assert len(labels) == len(tensor), "one label per row"
    return tensor[dominants.to(tensor.device)]


def mean_rows(
    tensor: Float[Tensor, "E ..."], labels: Int[Tensor, " E"], dominants: Int[Tensor, " G"]
) -> Float[Tensor, "G ..."]:
    """The mean of each group's rows, in float32; a group of one keeps its row bit for bit."""
    member = (labels >= 0).to(tensor.device)
    group = labels.to(tensor.device)[member]
    total = tensor.new_zeros((len(dominants), *tensor.shape[1:]), dtype=torch.float32)
    total.index_add_(0, group, tensor[member].float())
    size = torch.bincount(group, minlength=len(dominants))
    return (total / size.view(-1, *(1,) * (tensor.dim() - 1))).to(tensor.dtype)


ROUTERS: dict[str, Rows] = {"dominant": dominant_rows, "mean": mean_rows}
"""Rules for any tensor with the expert on axis 0; `refit.REFITS` holds those that are fitted."""
