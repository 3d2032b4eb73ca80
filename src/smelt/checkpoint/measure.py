"""How large the experts of a module are, one by one."""

from typing import Any

import torch
from torch import Tensor, nn

from smelt.checkpoint.bind import is_module_dict
from smelt.checkpoint.factored import is_factored
from smelt.checkpoint.factored_forward import matrices


def expert_sizes(experts: nn.Module) -> tuple[Tensor, list[nn.Parameter]]:
    """Values of each stored expert [G], and the parameters that they lie in.

    What all experts share (a norm after them) and constants in the place of dropped ones are not
    counted. In factored form experts differ: each has rows of S of its own.
    """
    module: Any = experts
    G: int = module.num_experts
    if is_module_dict(experts) and not is_factored(experts):
        each = [list(module[f"expert_{i}"].parameters()) for i in range(G)]
        sizes = [float(sum(p.numel() for p in own)) for own in each]
        return torch.tensor(sizes, dtype=torch.float64), [p for own in each for p in own]
    own = [
        (name, p)
        for name, p in experts.named_parameters(recurse=False)
        if p.dim() > 1 and p.shape[0] == G and name != "constants" and not name.endswith("_rows")
    ]
    values = torch.full((G,), float(sum(p.numel() // G for _, p in own)), dtype=torch.float64)
    params = [p for _, p in own]
    for m in matrices(experts) if is_factored(experts) else ():
        rows, out = module.get_parameter(f"{m}_rows"), module.get_parameter(f"{m}_u").shape[1]
        expert = module.get_buffer(f"{m}_row_ids").cpu().long() // out
        values += torch.bincount(expert, minlength=G) * rows.shape[1]
        params.append(rows)
    return values, params
