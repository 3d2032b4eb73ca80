"""A model divided among processes: FSDP2, with the shared experts divided once for all layers.

Each process holds its part of every parameter, of its gradient and of its optimizer state, as
DTensors. A pool that several layers share belongs to the root: it is gathered once a step, not once
a layer, and its gradient is reduced once. A block's own experts come and go with the block.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from smelt import processes
from smelt.errors import RecipeError
from smelt.samoe.blocks import Attention, DenseMLP
from smelt.samoe.pool import ExpertPool

MOST_PADDING = 1.1  # rows after padding to equal parts, as a multiple of the rows there are


@dataclass(frozen=True)
class Division:
    """How a model was divided."""

    is_low: bool  # its matrices are gathered in bfloat16
    scalars: frozenset[str]  # parameters that are vectors of one while it is divided


_DIVISIONS: WeakKeyDictionary[nn.Module, Division] = WeakKeyDictionary()


def build(make: Callable[[], PreTrainedModel], *, is_low: bool) -> PreTrainedModel:
    """The model that `make` gives, divided among the processes, where there are several.

    Its weights are those of the first process: the others never hold more than one whole tensor.

    Args:
        make: the model with its initial weights.
        is_low: its matrices are gathered in bfloat16, for training under autocast; what is
            computed in float32 there (routers, norms, α, β, embeddings) is gathered in float32.
    """
    if not dist.is_initialized():
        return make()
    real = make() if processes.is_first() else None
    with torch.device("meta"):
        model = make()
    divide(model, is_low=is_low)
    model.to_empty(device=_device())
    model.tie_weights()
    fill(model, real)
    return model


def divide(model: PreTrainedModel, *, is_low: bool = False) -> None:
    """Divide the parameters of a model among all processes, in place.

    Raises:
        RecipeError: this transformers cannot train such a model.
    """
    if not hasattr(model, "is_distributed_loading_by_transformers"):
        raise RecipeError(
            f"transformers {transformers.__version__} cannot train a model that is divided among "
            "processes. Install 5.23 or later, or start one process."
        )
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    for path in scalars:  # FSDP2 takes none: they become vectors of one
        parent, _, name = path.rpartition(".")
        scalar = model.get_parameter(path)
        one = nn.Parameter(scalar.detach()[None], requires_grad=scalar.requires_grad)
        model.get_submodule(parent).register_parameter(name, one)
    device = _device().type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    shared = {id(pool) for pool in _shared_pools(model)}
    if is_low:
        # what these return is added to, not written to: a view does no harm
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)
        for module in model.modules():
            if isinstance(module, Attention | DenseMLP | ExpertPool):
                _divide(module, mesh, mp_policy=low, reshard_after_forward=id(module) not in shared)
            if isinstance(module, ExpertPool) and id(module) not in shared:
                register_fsdp_forward_method(module, "run")
    names = set(model._no_split_modules or ())
    for module in [m for m in model.modules() if type(m).__name__ in names]:
        _divide(module, mesh, reshard_after_forward=True)
    _divide(model, mesh, reshard_after_forward=False)
    _DIVISIONS[model] = Division(is_low, frozenset(scalars))
    # transformers' mark of a model that places and reduces by itself: its Trainer leaves that alone
    model._is_distributed_loading_by_transformers = True


def _divide(module: nn.Module, mesh: DeviceMesh, **settings: Any) -> None:
    fully_shard(module, mesh=mesh, shard_placement_fn=_placement, **settings)


def _placement(parameter: nn.Parameter) -> Shard | None:
    """Which axis is cut: the first, unless that leaves processes with little or nothing.

    64 experts on 128 GPUs are cut along their hidden units. FSDP2 cuts other axes than the first
    in equal parts only.
    """
    parts = dist.get_world_size()
    rows = parameter.shape[0]
    if -(-rows // parts) * parts <= MOST_PADDING * rows:
        return None
    even = [axis for axis in range(1, parameter.ndim) if parameter.shape[axis] % parts == 0]
    return Shard(even[0]) if even else None


def _shared_pools(model: PreTrainedModel) -> list[nn.Module]:
    return list(getattr(model.base_model, "pools", ()))


def is_divided(model: nn.Module) -> bool:
    """Whether the model is divided among processes."""
    return isinstance(model, FSDPModule)


def precision(model: nn.Module) -> torch.autocast:
    """Within: a forward of the model outside of training; autocast if its matrices arrive low."""
    is_low = is_divided(model) and _DIVISIONS[model].is_low
    return torch.autocast(_device().type, torch.bfloat16, enabled=is_low)


def kind(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The model's class before it was divided."""
    classes = (c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    return cast("type[PreTrainedModel]", next(classes))


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


# --- whole tensors -------------------------------------------------------------------------------


@torch.no_grad()
def fill(model: PreTrainedModel, source: nn.Module | None) -> None:
    """Give a divided model the weights and buffers of a whole one, which the first process has."""
    put_together(model)
    values = dict(_tensors(source)) if source is not None else {}
    for name, tensor in _tensors(model):
        if isinstance(tensor, DTensor):
            full = values[name].detach() if values else torch.empty(tensor.shape)
            full = full.reshape(tensor.shape).to(tensor.device, tensor.dtype)
            part = distribute_tensor(full, tensor.device_mesh, tensor.placements)
            tensor.to_local().copy_(part.to_local())
        else:
            if values:
                tensor.copy_(values[name])
            dist.broadcast(tensor, 0)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def put_together(model: nn.Module) -> None:
    """Free what the last forward gathered, so that parameters are each process's parts again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A parameter, gradient or state in full; all processes ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameters(model: nn.Module, own_name: str) -> list[Tensor]:
    """Every parameter of that name (α, β), in full and in the shape of the whole model's.

    All processes ask together.
    """
    scalars = _DIVISIONS[model].scalars if is_divided(model) else ()
    return [
        whole(parameter)[0] if path in scalars else whole(parameter)
        for path, parameter in model.named_parameters()
        if path.rpartition(".")[2] == own_name
    ]


def part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel | None:
    """An ordinary copy of the model, cast to `dtype`; of a divided one in the first process only.

    A whole model that has the dtype already is given itself. All processes ask together.
    """
    if not is_divided(model):
        return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)  # type: ignore[arg-type]
    put_together(model)
    values = {}
    for name, tensor in model.named_parameters():
        full = whole(tensor)
        if processes.is_first():
            values[name] = full.to("cpu", dtype)
    if not processes.is_first():
        return None
    values |= {name: tensor.to("cpu") for name, tensor in _saved_buffers(model)}
    with torch.device("meta"):
        copied: PreTrainedModel = kind(model)(copy.deepcopy(model.config))
    for name, parameter in copied.named_parameters():
        values[name] = values[name].reshape(parameter.shape)
    copied.load_state_dict(values, strict=False, assign=True)
    copied.tie_weights()
    if model.can_generate():
        copied.generation_config = model.generation_config
    left = [name for name, tensor in copied.named_parameters() if tensor.is_meta]
    assert not left, left
    return copied


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all weights to `dtype` in place; they stay what they are."""
    if is_divided(model):
        put_together(model)
    for tensor in [*model.parameters(), *(buffer for _, buffer in _saved_buffers(model))]:
        if tensor.is_floating_point():
            part(tensor).copy_(part(tensor).to(dtype))


def check_batch(batch_size: int, accumulate: int) -> None:
    """Refuse a batch that the processes cannot share equally."""
    parts = accumulate * processes.started()
    if batch_size % parts:
        raise RecipeError(
            f"batch_size = {batch_size} cannot be cut into {accumulate} micro-batches for each of "
            f"{processes.started()} processes. Make it a multiple of {parts}, or start another "
            "number of processes."
        )
