"""The down projections that give the least squared error of a layer's output, in closed form.

A layer's output is linear in its down projections once routing and hidden units are given: ridge
least squares, expert by expert, each on what the others leave.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smelt.experts import ExpertBank, hidden


def solve_down(
    bank: ExpertBank,
    x: Float[Tensor, "N D"],
    choice: Int[Tensor, "N K"],
    gate: Float[Tensor, "N K"],
    residual: Float[Tensor, "N D"],
    *,
    ridge: float,
    sweeps: int = 2,
    weight: Float[Tensor, " N"] | None = None,
    reduce: Callable[[Sequence[Tensor]], None] = lambda tensors: None,
) -> ExpertBank:
    """The bank with other down projections (and their biases, where it has them).

    Minimises Σ_t weight·‖residual − Σ_k gate·ΔW h‖² + λ‖ΔW‖² over the changes ΔW of all experts, by
    Gauss–Seidel over the experts: no step makes the sum larger. λ is `ridge` times the mean
    diagonal of an expert's Gram, so an expert that no token reaches stays as it is.

    Args:
        choice: expert ids of the bank; any other id adds nothing.
        gate: what multiplies the expert's output.
        residual: what should be added to the layer's output. Not changed.
        reduce: sums over processes, each with tokens of its own.

    Source: ridge least squares of down projections as in MergeMoE, arXiv:2510.14436, there for the
    experts of one group, here for all experts of the layer together.
    """
    down = bank.down.float().clone()
    bias = None if bank.down_bias is None else bank.down_bias.float().clone()
    left = residual.float().clone()
    scale = gate.float() if weight is None else gate.float() * weight.sqrt()[:, None]
    root = None if weight is None else weight.sqrt()
    for _ in range(sweeps):
        for expert in range(bank.num_experts):
            token, slot = torch.where(choice == expert)
            h = hidden(bank, expert, x[token].to(bank.up.dtype)).float()
            if bias is not None:
                h = torch.cat([h, h.new_ones(len(h), 1)], 1)
            inputs = h * scale[token, slot, None]
            wanted = left[token] if root is None else left[token] * root[token, None]
            gram, product = (inputs.T @ inputs).double(), (inputs.T @ wanted).double()
            reduce([gram, product])
            mean = float(gram.diagonal().mean())
            if not mean > 0:
                continue
            gram.diagonal().add_(ridge * mean)
            change = torch.cholesky_solve(product, torch.linalg.cholesky(gram)).float()
            left.index_add_(0, token, h * gate[token, slot, None].float() @ change, alpha=-1)
            down[expert] += change[: bank.hidden_size].T
            if bias is not None:
                bias[expert] += change[-1]
    changed = {"down": down} if bias is None else {"down": down, "down_bias": bias}
    return bank.replaced(changed)
