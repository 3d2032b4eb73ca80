"""Which parameters AdamW decays."""

from torch import nn


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
