"""Experts in factored form: every matrix is U V + S, and only a few rows of S are stored.

This file is self-contained (torch only). `mapped.py` imports it relatively; both lie beside the
weights of a mapped checkpoint, so that it loads without smelt. Licensed under Apache-2.0, as smelt
is.

A factored module of G stored experts holds, for each matrix m ("gate" where there is one, "up",
"down"; [O, I], out × in):

    {m}_u [G, O, R]   {m}_v [G, R, I]   {m}_rows [M, I]   {m}_row_ids [M] int32   {m}_bias [G, O]

`rows` are the kept rows of all experts' S, expert by expert, and `row_ids` says where they belong:
expert · O + row, ascending. No dense W is ever made: y = U(V x) + scatter(S_kept x).

While S is being pruned (healing) a module is *open*: {m}_s [G, O, I] stands in the place of rows
and row_ids.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .factored_forward import forward, is_open, matrices

Spec = Mapping[str, Mapping[str, int]]
"""By matrix: {"rank": R, "rows": M}, as in the configuration's `factored_experts`."""

_FUSED = ("gate_up_proj", "up_proj", "down_proj")


def is_factored(experts: nn.Module) -> bool:
    """Whether an experts module is in factored form, open or closed."""
    return "down_u" in experts._parameters


def factor_experts(experts: nn.Module, spec: Spec) -> None:
    """Turn a mapped experts module into a factored one whose tensors are empty, to be loaded."""
    shapes = dense_weights(experts, lambda p: p.detach().to("meta"))
    device = next(experts.parameters()).device
    _forget_dense(experts)
    for name, like in shapes.items():
        if name.endswith("_bias"):
            tensors = {name: torch.empty(like.shape, dtype=like.dtype, device=device)}
        else:
            (G, out, width), R, M = like.shape, spec[name]["rank"], spec[name]["rows"]
            sizes = {"u": (G, out, R), "v": (G, R, width), "rows": (M, width)}
            tensors = {
                f"{name}_{part}": torch.empty(size, dtype=like.dtype, device=device)
                for part, size in sizes.items()
            }
            # Spread over the experts: a place for every row, also where nothing is loaded.
            ids = torch.arange(M, device=device, dtype=torch.int32)
            experts.register_buffer(f"{name}_row_ids", ids)
        for key, tensor in tensors.items():
            experts.register_parameter(key, nn.Parameter(tensor))


def open_experts(
    experts: nn.Module,
    rank: Mapping[str, int],
    split: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> None:
    """Make a mapped or factored module trainable as U V + S with S dense: {m}_u, {m}_v, {m}_s.

    Args:
        rank: R by matrix; of a factored module it must be what the module has.
        split: (W [G, O, I], R) → U [G, O, R], V [G, R, I]; the truncated SVD.

    S = W − U V in the weights' own type, so the function is the same within its rounding.
    Raises ValueError for a module that is neither, is open, or has another rank.
    """
    if "expert_map" not in experts._buffers or is_open(experts):
        raise ValueError(
            f"{type(experts).__name__} cannot be opened: open a mapped or a factored module, once."
        )
    if is_factored(experts):
        _open_factored(experts, rank)
        return
    weights = dense_weights(experts, lambda p: p.detach())
    needs_grad = next(experts.parameters()).requires_grad
    _forget_dense(experts)
    for name in list(weights):
        value = weights.pop(name)
        tensors = {name: value.clone()}
        if not name.endswith("_bias"):
            u, v = split(value, rank[name])
            u, v = u.to(value.dtype), v.to(value.dtype)
            rest = torch.stack([w - a @ b for w, a, b in zip(value, u, v, strict=True)])
            tensors = {f"{name}_u": u, f"{name}_v": v, f"{name}_s": rest}
        for key, tensor in tensors.items():
            param = nn.Parameter(tensor.contiguous(), requires_grad=needs_grad)
            experts.register_parameter(key, param)


def _open_factored(experts: nn.Module, rank: Mapping[str, int]) -> None:
    params, buffers = experts._parameters, experts._buffers
    for m in matrices(experts):
        u, v, rows = params[f"{m}_u"], params[f"{m}_v"], params[f"{m}_rows"]
        ids = buffers[f"{m}_row_ids"]
        assert u is not None and v is not None and rows is not None and ids is not None
        if rank[m] != u.shape[2]:
            raise ValueError(f"{m}: rank {rank[m]} asked for, the module has {u.shape[2]}.")
        (G, out, _), width = u.shape, v.shape[2]
        dense = rows.new_zeros(G * out, width)
        dense[ids.long()] = rows.detach()
        del params[f"{m}_rows"], buffers[f"{m}_row_ids"]
        param = nn.Parameter(dense.view(G, out, width), requires_grad=rows.requires_grad)
        experts.register_parameter(f"{m}_s", param)


def close_experts(experts: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Pack S into its kept rows; returns the module's entry in `factored_experts`.

    Args:
        masks: by matrix, the rows that are kept, bool [G, O]; what is not kept is lost.

    Raises ValueError for a module that is not open, or a mask of another shape.
    """
    if not is_open(experts):
        raise ValueError(f"{type(experts).__name__} is not open: there is nothing to close.")
    params, spec = experts._parameters, {}
    for m in matrices(experts):
        s, u, mask = params[f"{m}_s"], params[f"{m}_u"], masks[m]
        assert s is not None and u is not None
        if mask.dtype != torch.bool or mask.shape != s.shape[:2]:
            raise ValueError(
                f"{m}: a mask of {mask.dtype} {list(mask.shape)}, the module needs torch.bool "
                f"{list(s.shape[:2])}."
            )
        ids = mask.to(s.device).flatten().nonzero().squeeze(1)
        rows = s.detach().flatten(0, 1)[ids].clone()
        del params[f"{m}_s"]
        experts.register_parameter(f"{m}_rows", nn.Parameter(rows, requires_grad=s.requires_grad))
        experts.register_buffer(f"{m}_row_ids", ids.int())
        spec[m] = {"rank": u.shape[2], "rows": len(ids)}
    return spec


def open_model(
    model: nn.Module,
    ranks: Mapping[str, Mapping[str, int]],
    split: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> None:
    """`open_experts` of every experts module named in `ranks` (module name → matrix → R)."""
    for name, rank in ranks.items():
        open_experts(model.get_submodule(name), rank, split)


def close_model(model: Any, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """`close_experts` of every module named in `masks`, and the configuration to match.

    Afterwards `save_pretrained` writes the compact checkpoint. Raises ValueError where a module
    stays open: a dense S is never a result.
    """
    still = [n for n, module in model.named_modules() if is_open(module) and n not in masks]
    if still:
        raise ValueError(f"{', '.join(still)}: open, and no mask is given for it.")
    specs = dict(getattr(model.config, "factored_experts", None) or {})
    for name, mask in masks.items():
        specs[name] = close_experts(model.get_submodule(name), mask)
    model.config.factored_experts = specs


def dense_weights(experts: nn.Module, get: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """The weights of a dense experts module by matrix, [G, O, I], and "{m}_bias" [G, O]."""
    module: Any = experts
    if isinstance(experts, nn.ModuleDict):
        each: list[Any] = [experts[f"expert_{i}"] for i in range(module.num_experts)]
        return {
            "up": torch.stack([get(e.wi.weight) for e in each]),
            "down": torch.stack([get(e.wo.weight) for e in each]),
        }

    def oriented(param: nn.Parameter) -> Tensor:
        return get(param).transpose(1, 2) if module.is_transposed else get(param)

    found = {"down": oriented(module.down_proj)}
    if module.has_bias:
        found["down_bias"] = get(module.down_proj_bias)
    if not module.has_gate:
        found["up"] = oriented(module.up_proj)
        return found | ({"up_bias": get(module.up_proj_bias)} if module.has_bias else {})
    joined = {"": oriented(module.gate_up_proj)}
    if module.has_bias:
        joined["_bias"] = get(module.gate_up_proj_bias)
    for end, both in joined.items():
        half = both.shape[1] // 2
        parts = (both[:, :half], both[:, half:])
        if not module.is_concatenated:
            parts = (both[:, 0::2], both[:, 1::2])
        found["gate" + end], found["up" + end] = parts
    return found


def _forget_dense(experts: nn.Module) -> None:
    """Take the dense weights out; what stays says how these experts compute."""
    module: Any = experts
    if isinstance(experts, nn.ModuleDict):
        first: Any = experts["expert_0"]
        for index in range(module.num_experts):
            del experts[f"expert_{index}"]
        module.act, module.dropout = first.act, first.dropout
    else:
        for name in _FUSED:
            experts._parameters.pop(name, None)
            experts._parameters.pop(name + "_bias", None)
    base = type(experts)
    name = f"SmeltFactored{base.__name__}"
    experts.__class__ = define(__name__, name, (base,), {"forward": forward})


def define(module: str, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
    """A class of a module by name, made once for the same bases (so that it can be pickled)."""
    home = sys.modules[module]
    known = getattr(home, name, None)
    if known is None or known.__bases__ != bases:
        known = type(name, bases, {**members, "__module__": module})
        setattr(home, name, known)
    return known
