"""Fewer hidden units in every expert: a row of up and gate and a column of down leave together.

What is left is a plain, smaller expert, so the stock form can hold it (METHODS §3).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smelt.experts import ExpertBank, hidden, permute_hidden

_CHUNK = 4096
"""Tokens whose hidden activations are held at once."""


def unit_scores(
    bank: ExpertBank, x: Float[Tensor, "S D"], group: Int[Tensor, "S K"]
) -> Float[Tensor, "G F"]:
    """What each hidden unit adds to its expert's output: its mean square times that of its column.

    Means are over the tokens that chose the expert; one that none of them chose is scored by its
    weights alone, as if its inputs were white.

    Args:
        bank: the G experts that stay.
        x: a sample of the layer's inputs.
        group: the experts that each of them goes to; below 0: none.

    Source: ours. Dropping a unit changes the output by its activation times its column of down; the
    score is the expected square of that, units taken one at a time.
    """
    scores = []
    for expert in range(bank.num_experts):
        column = bank.down[expert].float().square().sum(0)
        tokens = x[(group == expert).any(-1)].to(bank.up.device, bank.up.dtype)
        if len(tokens):
            total = torch.zeros(bank.hidden_size, dtype=torch.float64, device=bank.up.device)
            for part in tokens.split(_CHUNK):
                total += hidden(bank, expert, part).double().square().sum(0)
            scores.append((total / len(tokens) * column).cpu())
            continue
        rows = bank.up[expert].float().square().sum(1)
        if bank.gate is not None:
            rows = rows * bank.gate[expert].float().square().sum(1)
        scores.append((rows * column).double().cpu())
    return torch.stack(scores)


def keep_units(bank: ExpertBank, scores: Float[Tensor, "G F"], number: int) -> ExpertBank:
    """The bank with the `number` best hidden units of each expert, in stored order; ties: lower."""
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :number]
    return permute_hidden(bank, best.sort(dim=1).values)
