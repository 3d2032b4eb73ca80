"""Decomposed experts the slow, obvious way: one token, one choice, one row at a time."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def dense(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """W [G, O, I] of one matrix: U V, and every kept row added where its number says."""
    u, v = tensors[f"{name}_u"], tensors[f"{name}_v"]
    experts = [a @ b for a, b in zip(u, v, strict=True)]
    num_rows = u.shape[1]
    for row, number in zip(
        tensors[f"{name}_rows"], tensors[f"{name}_row_ids"].tolist(), strict=True
    ):
        expert, place = divmod(number, num_rows)
        unit = torch.zeros(num_rows, dtype=row.dtype)
        unit[place] = 1.0
        experts[expert] = experts[expert] + unit[:, None] * row[None]
    return torch.stack(experts)


def layer(
    tensors: Mapping[str, Tensor],
    activation: Callable[[Tensor | None, Tensor], Tensor],
    expert_map: Tensor,
    x: Tensor,
    choice: Tensor,
    weight: Tensor,
) -> Tensor:
    """Σ_k weight · f_{map[choice]}(x) for every token; a choice of −1 adds nothing."""
    names = [n for n in ("gate", "up", "down") if f"{n}_u" in tensors]
    matrices = {name: dense(tensors, name) for name in names}
    biases = {name: tensors.get(f"{name}_bias") for name in names}

    def product(name: str, expert: int, value: Tensor) -> Tensor:
        y = matrices[name][expert] @ value
        bias = biases[name]
        return y if bias is None else y + bias[expert]

    tokens = []
    for token, ids, weights in zip(x, choice.tolist(), weight, strict=True):
        total = torch.zeros_like(token)
        for slot, wanted in enumerate(ids):
            if wanted < 0:
                continue
            expert = int(expert_map[wanted])
            gate = product("gate", expert, token) if "gate" in matrices else None
            hidden = activation(gate, product("up", expert, token))
            total = total + weights[slot] * product("down", expert, hidden)
        tokens.append(total)
    return torch.stack(tokens)
