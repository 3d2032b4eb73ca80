"""Watching a layer at the call of its experts: what was routed where, and what came of it.

The ids and weights are those the model passes to its experts, so every routing rule is right by
construction. The outputs are the model's own: the watcher runs the same products and adds the
statistics while an expert's output is still in cache.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smelt.checkpoint.bind import MoeLayer, expert_function, is_module_dict
from smelt.errors import CalibrationError
from smelt.routing import Accumulator, Routing

Rows = Callable[[], tuple[Tensor | None, Tensor]]
"""For the batch now running: ids of its real tokens (None: all), and which of those are sampled."""

_TOKENS_AT_ONCE = 128


@contextlib.contextmanager
def watch(model: nn.Module, layer: MoeLayer, rows: Rows, sums: Accumulator) -> Iterator[None]:
    """Within: every call of the layer's experts adds to `sums`; the outputs are unchanged."""
    experts = model.get_submodule(layer.experts)
    logits: list[Tensor] = []
    hook = None
    if layer.router is not None:
        router = model.get_submodule(layer.router)
        hook = router.register_forward_hook(
            lambda module, args, output: logits.append(_logits(output, layer.num_experts))
        )
    capacity = lift_capacity(model, layer)
    one_hot = is_module_dict(experts)

    def forward(x: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        ids = _ids(choice) if one_hot else choice
        routing = Routing(ids, weight, logits.pop() if logits else None)
        return _observed(experts, layer, x, routing, rows, sums)

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward
        if hook is not None:
            hook.remove()
        capacity()


@contextlib.contextmanager
def reached(model: nn.Module, layers: Sequence[MoeLayer]) -> Iterator[list[list[Tensor]]]:
    """Within: by layer, the ids [U] of the stored experts that each call of its experts reaches.

    Stored ones: in a mapped checkpoint several choices may be served by one, or by none.
    """
    found: list[list[Tensor]] = [[] for _ in layers]
    hooks = []
    for layer, calls in zip(layers, found, strict=True):

        def note(module: Any, given: Any, named: Any, calls: list[Tensor] = calls) -> None:
            values = [*given, *named.values()]  # hidden states, choices, their weights
            calls.append(_reached(module, values[1], values[2]))

        experts = model.get_submodule(layer.experts)
        hooks.append(experts.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _reached(experts: Any, choice: Tensor, weight: Tensor) -> Tensor:
    """The stored experts among the choices, ascending; a choice of weight 0 is none (Zaya)."""
    if is_module_dict(experts):
        ids = _ids(choice).flatten()
    else:
        ids = choice[weight != 0]
    if hasattr(experts, "expert_map"):
        slots = experts.expert_map.long()
        ids = slots[ids[(ids >= 0) & (ids < len(slots))]]
    return ids[(ids >= 0) & (ids < experts.num_experts)].unique()


def _ids(one_hot: Tensor) -> Tensor:
    """Expert ids from a one-hot dispatch [N, 1, E]; a dropped token gets id E."""
    kept = one_hot.sum(-1) > 0
    return torch.where(kept, one_hot.argmax(-1), one_hot.shape[-1])


def lift_capacity(model: nn.Module, layer: MoeLayer) -> Callable[[], None]:
    """No token is dropped for capacity from now on; the returned call restores the limit."""
    router = model.get_submodule(layer.router) if layer.router else None
    limit = getattr(router, "expert_capacity", None)
    if router is None or limit is None:
        return lambda: None
    router.expert_capacity = 1 << 30  # type: ignore[assignment]
    return lambda: setattr(router, "expert_capacity", limit)


def _logits(output: Any, num_experts: int) -> Tensor:
    """The scores per expert in what a router returned: its first [.., E] float tensor.

    Or its first float tensor, cut to E columns, where it scores a few things more than the experts.
    """
    parts = output if isinstance(output, (tuple, list)) else [output]
    floats = [p for p in parts if isinstance(p, Tensor) and p.is_floating_point()]
    # Switch returns (one-hot ids, probability, logits): ids are integers, so the rule holds too.
    exact = [p for p in floats if p.shape[-1] == num_experts]
    wider = [p[..., :num_experts] for p in floats[:1] if p.shape[-1] > num_experts]
    if not exact + wider:
        raise CalibrationError("The router returns no score per expert; its family needs an entry.")
    return (exact + wider)[0].reshape(-1, num_experts)


def _observed(
    experts: nn.Module,
    layer: MoeLayer,
    x: Tensor,
    routing: Routing,
    rows: Rows,
    sums: Accumulator,
) -> Tensor:
    num_tokens, num_choices = routing.choice.shape
    num_experts = layer.num_experts
    real, sampled = rows()
    # A weight of 0 is how a router says that it wants no expert (Zaya): not a use of any.
    flat = routing.choice.masked_fill(routing.weight == 0, num_experts).reshape(-1)
    sorted_ids, order = torch.sort(flat, stable=True)
    token = order // num_choices
    edges = torch.searchsorted(
        sorted_ids, torch.arange(num_experts + 1, device=flat.device)
    ).tolist()
    is_real = None
    if real is not None:
        is_real = torch.zeros(num_tokens, dtype=torch.bool, device=x.device)
        is_real[real] = True
    gate = routing.weight.reshape(-1)[order]
    stop = edges[-1]
    out = x.new_empty(flat.shape[0], x.shape[-1], dtype=torch.promote_types(x.dtype, gate.dtype))
    out[stop:] = 0
    norm = torch.empty(stop, dtype=torch.float32, device=x.device)
    totals = torch.zeros(num_experts, x.shape[-1], dtype=torch.float32, device=x.device)
    run = expert_function(experts)
    for expert in range(num_experts):
        start, end = edges[expert], edges[expert + 1]
        if start == end:
            continue
        y = run(expert, x.index_select(0, token[start:end]))
        torch.mul(y, gate[start:end, None], out=out[start:end])
        norm[start:end] = torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32)
        kept = y if is_real is None else y[is_real[token[start:end]]]
        totals[expert] = kept.sum(0, dtype=torch.float32)
    seen = slice(0, stop) if is_real is None else torch.where(is_real[token[:stop]])[0]
    sums.add_outputs(sorted_ids[seen], gate[seen], norm[seen], totals)
    kept_x, kept_routing = x, routing
    if real is not None:
        logits = None if routing.logits is None else routing.logits[real]
        kept_x = x[real]
        kept_routing = Routing(routing.choice[real], routing.weight[real], logits)
    sums.add_routing(kept_x, kept_routing, sampled)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    return _summed(out, place.view(num_tokens, num_choices), x.dtype)


def _summed(out: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of each token's K choices, whose rows of `out` [N·K, D] are `place` [N, K].

    Some tokens at a time: a second tensor of N·K·D fresh memory costs more than the sum itself.
    """
    total = out.new_empty(place.shape[0], out.shape[1], dtype=dtype)
    for start in range(0, place.shape[0], _TOKENS_AT_ONCE):
        rows = place[start : start + _TOKENS_AT_ONCE]
        picked = out.index_select(0, rows.reshape(-1)).view(*rows.shape, -1)
        total[start : start + _TOKENS_AT_ONCE] = picked.sum(1)
    return total
