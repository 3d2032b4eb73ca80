"""Which parameters AdamW decays, and which of them learn at another rate."""

from torch import nn
from torch.optim import Optimizer


def decayed(model: nn.Module) -> list[str]:
    """The names of the parameters with weight decay: matrices, embeddings and stacks of matrices.

    Not decayed: alpha, beta, biases, and all parameters of normalisation layers or with fewer than
    two axes.
    """
    names = []
    for path, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for own, parameter in module.named_parameters(recurse=False):
            is_scale = own in {"alpha", "beta"} or "bias" in own
            if parameter.ndim >= 2 and not is_norm and not is_scale:
                names.append(f"{path}.{own}" if path else own)
    return names


def hasten_embeddings(optimizer: Optimizer, model: nn.Module, factor: float) -> None:
    """Give embeddings `factor` times the learning rate of all else, in groups of their own.

    AdamW's steps are as long for every parameter, whatever its size. T5 and Switch draw embeddings
    with a standard deviation of 1 and matrices with one of about 1/√D, so that at one rate the
    embeddings hardly learn (docs/tasks.md). Adafactor, by which they were trained, scales each step
    by the parameter.
    """
    if factor == 1:
        return
    own = {
        id(module.weight)
        for name, module in model.named_modules()
        # a table of how far positions lie apart is no embedding of tokens
        if isinstance(module, nn.Embedding) and not name.endswith("relative_attention_bias")
    }
    for group in list(optimizer.param_groups):
        fast = [p for p in group["params"] if id(p) in own]
        if not fast:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.add_param_group({**group, "params": fast, "lr": factor * group["lr"]})
