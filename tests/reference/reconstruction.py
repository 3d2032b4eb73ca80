"""The obvious, slow versions of fits: an error written out, and least squares by descent."""

import torch
from torch import Tensor

from smelt.experts import ExpertBank, mixture


def relative_error(y: Tensor, target: Tensor) -> float:
    """Σ‖y − target‖² / Σ‖target‖², token by token."""
    wrong = sum(float((a - b).double().square().sum()) for a, b in zip(y, target, strict=True))
    return wrong / sum(float(t.double().square().sum()) for t in target)


def best_down_by_gradient(
    bank: ExpertBank,
    x: Tensor,
    choice: Tensor,
    gate: Tensor,
    residual: Tensor,
    weight: Tensor | None,
) -> ExpertBank:
    """The bank whose change of output is nearest to the residual, by L-BFGS on its down parts."""
    names = [n for n in ("down", "down_bias") if n in bank.tensors()]
    free = {n: bank.tensors()[n].clone().requires_grad_() for n in names}
    before = mixture(bank, x, choice, gate)
    scale = torch.ones(len(x)) if weight is None else weight
    optimiser = torch.optim.LBFGS(
        list(free.values()), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        change = mixture(bank.replaced(free), x, choice, gate) - before
        loss = ((change - residual).square().sum(1) * scale).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return bank.replaced({n: t.detach() for n, t in free.items()})
