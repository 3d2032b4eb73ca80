"""A factored experts module as a FactorBank, read and written."""

from collections.abc import Callable

from torch import Tensor, nn

from smelt.checkpoint.factored import is_factored
from smelt.checkpoint.factored_forward import matrices
from smelt.experts import Activation
from smelt.factors import FactorBank


def read_factors(
    module: nn.Module, path: str, read: Callable[[str], Tensor], activation: Activation
) -> FactorBank:
    """The factors of a factored module, closed; `activation`: `bind.activation_of(module)`."""
    assert is_factored(module)
    names = [f"{m}_{part}" for m in matrices(module) for part in ("u", "v", "rows", "row_ids")]
    names += [name for name in module._parameters if name.endswith("_bias")]
    return FactorBank.of({name: read(f"{path}.{name}") for name in names}, activation)


def write_factors(path: str, bank: FactorBank) -> dict[str, Tensor]:
    """The state of a factored module by name, contiguous; `expert_map` is the caller's."""
    return {f"{path}.{name}": tensor.contiguous() for name, tensor in bank.tensors().items()}


def factor_spec(bank: FactorBank) -> dict[str, dict[str, int]]:
    """The module's entry in the configuration's `factored_experts`."""
    return {
        name: {"rank": matrix.rank, "rows": len(matrix.row_ids)}
        for name, matrix in bank.matrices().items()
    }
