"""What a model has learnt of sharing: α, β, how many combinations there are, and how hard."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smelt.analyse.moments import numbers
from smelt.analyse.runs import Run
from smelt.samoe.backbone import SaMoEModel


def effective_rank(matrix: Float[Tensor, "L P"]) -> float:
    """exp of the entropy of the singular values over their sum; 0 of a zero matrix.

    Between 1 (every row a multiple of one) and min(L, P) (as many directions, equally strong).

    Source: Roy & Vetterli 2007, "The effective rank".
    """
    values = torch.linalg.svdvals(matrix.double())
    if not float(values.sum()):
        return 0.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def distance_from_one_hot(rows: Float[Tensor, "*L P"]) -> Float[Tensor, "*L"]:
    """1 − max|α| / ‖α‖₂ of every row: 0 is one-hot, 1 − 1/√P is even; nan of a zero row."""
    distance: Tensor = 1 - rows.abs().amax(-1) / rows.norm(dim=-1)
    return distance


def largest_share(rows: Float[Tensor, "*L P"]) -> Float[Tensor, "*L"]:
    """max|α| / Σ|α| of every row: 1 is one-hot, 1/P is even; nan of a zero row."""
    return rows.abs().amax(-1) / rows.abs().sum(-1)


def alpha_of(base: SaMoEModel) -> Float[Tensor, "L P C"] | None:
    """α of all MoE layers, in columns: one, or one per expert or matrix; None: there is none."""
    alphas = [layer.alpha for layer in base.moe_layers()]
    if not alphas or any(alpha is None for alpha in alphas):
        return None
    rows = torch.stack([a.detach().double().cpu() for a in alphas if a is not None])
    return rows.reshape(*rows.shape[:2], -1)


def columns(base: SaMoEModel) -> list[str]:
    """What the columns of `alpha_of` are."""
    config = base.config
    if config.alpha_scope == "layer":
        return ["all"]
    if config.alpha_scope == "matrix":
        return ["up", *(["gate"] if config.is_gated else []), "down"]
    return [f"expert {e}" for e in range(config.num_experts)]


def report(base: SaMoEModel, run: Run) -> dict[str, Any]:
    """α, β and what they amount to, for JSON; {} of a model without either."""
    found: dict[str, Any] = {"blocks": [layer.block for layer in base.config.layout.layers]}
    alpha = alpha_of(base)
    if alpha is not None:
        L, P, num_columns = alpha.shape
        rows = alpha.transpose(1, 2)  # [L, C, P]
        ranks = [effective_rank(alpha[:, :, column]) for column in range(num_columns)]
        found["alpha"] = {
            "values": numbers(alpha),  # [L][P][C]
            "columns": columns(base),
            "effective_rank": ranks,  # of every column's [L, P]
            "highest_rank": min(L, P),
            "distance_from_one_hot": numbers(distance_from_one_hot(rows)),  # [L][C]
            "farthest_from_one_hot": 1 - P**-0.5,
            "largest_share": numbers(largest_share(rows)),
            "history": history(run, "alpha"),
        }
    betas = [layer.beta for layer in base.moe_layers()]
    if betas and all(beta is not None for beta in betas):
        found["beta"] = {
            "values": [float(f"{float(b.detach()):.6g}") for b in betas if b is not None],
            "history": history(run, "beta"),
        }
    return found if len(found) > 1 else {}


def history(run: Run, name: str) -> dict[str, Any] | None:
    """Values of every MoE layer at the steps that the log has them of; None: it has none."""
    lines = [line for line in run.log if _is_numbers(line.get(name))]
    if not lines:
        return None
    return {"steps": [line["step"] for line in lines], "values": [line[name] for line in lines]}


def _is_numbers(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
