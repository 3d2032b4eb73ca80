"""The values of a model's parameters that operations read, one by one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    """Within: by parameter, the places of its values that are read; rows of tables once a token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places: dict[int, set[Any]] = {
            p.untyped_storage().data_ptr(): set() for p in model.parameters()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = found if isinstance(found, tuple | list) else [found]
        views = {t.untyped_storage().data_ptr() for t in made if isinstance(t, Tensor)}
        given: list[Any] = []
        for argument in [*args, *(kwargs or {}).values()]:
            given += argument if isinstance(argument, list | tuple) else [argument]
        for tensor in given:
            if not isinstance(tensor, Tensor):
                continue
            address = tensor.untyped_storage().data_ptr()
            if address not in self.places or address in views:
                continue
            if "embedding" in str(func):
                rows, width = args[1].numel(), tensor.shape[1]
                self.places[address] |= {("row", r, d) for r in range(rows) for d in range(width)}
            else:
                self.places[address] |= set(places_of(tensor))
        return found

    def total(self) -> int:
        return sum(map(len, self.places.values()))


def places_of(tensor: Tensor) -> list[int]:
    """Where a view's values lie in its storage."""
    size = tensor.untyped_storage().size() // tensor.element_size()
    whole = torch.arange(size)
    return (
        whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().tolist()
    )
