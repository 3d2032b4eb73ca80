"""The forward of experts in factored form: y = U(V x) + scatter(S_kept x), no dense W.

This file is self-contained (torch only) and lies with `factored.py`, which says what is stored,
beside the weights of a mapped checkpoint. Licensed under Apache-2.0, as smelt is.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear, silu

_TOKENS_AT_ONCE = 256  # of one expert, without gradients: its hidden units stay in the cache
_FEW_ROWS = 32  # an expert, on average: gathered and added at once, by fewer operations


def is_open(experts: nn.Module) -> bool:
    """Whether a factored module holds S dense, to be trained and pruned."""
    return "down_s" in experts._parameters


def matrices(experts: nn.Module) -> tuple[str, ...]:
    """The matrices of a factored module's experts."""
    return ("gate", "up", "down") if "gate_u" in experts._parameters else ("up", "down")


def fold(
    expert_map: Tensor, choice: Tensor, weight: Tensor, num_stored: int
) -> tuple[Tensor, Tensor]:
    """Stored ids and weights of each choice [N, K]; a repeated id becomes an empty slot.

    The first of several choices that share a stored expert carries the sum of their weights, the
    others get id `num_stored` and weight 0, which experts implementations skip.
    """
    stored = expert_map.long()[choice].clamp(max=num_stored)  # above: a constant, added by itself
    weight = weight.masked_fill(stored == num_stored, 0)  # a dropped expert is an empty slot
    if choice.shape[-1] == 1:
        return stored, weight
    same = stored.unsqueeze(-1) == stored.unsqueeze(-2)
    is_first = ~same.tril(-1).any(-1)
    summed = (same.to(weight.dtype) * weight.unsqueeze(-2)).sum(-1)
    return stored.masked_fill(~is_first, num_stored), summed * is_first


def forward(self: Any, hidden_states: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
    """Σ_k weight · f_choice(x) of tokens [N, D]: the forward of every factored experts class."""
    # Sums of half-precision outputs are kept in float32, as transformers' own implementations do.
    total = torch.promote_types(hidden_states.dtype, torch.float32)
    out = hidden_states.new_zeros(hidden_states.shape, dtype=total)
    if len(hidden_states) == 1 and not torch.is_grad_enabled():
        return _one_token(self, hidden_states, choice, weight, out)
    stored, gate = _routed(self, choice, weight)
    G = self.num_experts
    flat = stored.reshape(-1)
    sizes = torch.bincount(flat, minlength=G + 1)[:G].tolist()
    order = torch.argsort(flat, stable=True)[: sum(sizes)]  # empty slots come last
    token, gate = order // stored.shape[1], gate.reshape(-1, 1)[order]
    if _kernel_serves(self, hidden_states):
        y = _grouped(self, hidden_states.index_select(0, token), sizes)
        out = out.index_add(0, token, y.to(total) * gate)
    elif torch.is_grad_enabled() or len(order) < _FEW_ROWS * sum(map(bool, sizes)):
        y = _each_expert(self, hidden_states.index_select(0, token), sizes)
        out = out.index_add(0, token, y.to(total) * gate)
    else:
        _add_each_expert(self, hidden_states, token, gate, sizes, out)
    return out.to(hidden_states.dtype)


def _routed(module: Any, choice: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Stored ids [N, K] and their weights; an empty slot has id G."""
    if not isinstance(module, nn.ModuleDict):
        return fold(module.expert_map, choice, weight, module.num_experts)
    expert_map: Any = module.expert_map
    found, ids = choice.max(-1)  # a one-hot dispatch [N, 1, E]; a dropped token has none
    return expert_map.long()[ids].masked_fill_(found == 0, module.num_experts), weight


def _one_token(module: Any, x: Tensor, choice: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Decoding a single sequence: routed in Python and not sorted, the fewest operations."""
    chosen, stored = choice.flatten().tolist(), module.expert_map.tolist()
    if isinstance(module, nn.ModuleDict):  # one-hot; a dropped token has no expert
        chosen = [chosen.index(1)] if 1 in chosen else []
    used: dict[int, float] = {}
    for expert, gate in zip(chosen, weight.flatten().tolist(), strict=False):
        if stored[expert] < module.num_experts:
            used[stored[expert]] = used.get(stored[expert], 0.0) + gate
    for gate, own in zip(used.values(), _weights(module, [*used]), strict=True):
        out.add_(_expert(module, x, own), alpha=gate)
    return out.to(x.dtype)


def _each_expert(module: Any, x: Tensor, sizes: list[int]) -> Tensor:
    """The outputs of rows in order of their expert, one expert after the other."""
    hit = [e for e, size in enumerate(sizes) if size]
    blocks = x.split([sizes[e] for e in hit])
    ys = [_expert(module, b, own) for b, own in zip(blocks, _weights(module, hit), strict=True)]
    return torch.cat(ys) if ys else x


def _add_each_expert(
    module: Any, x: Tensor, token: Tensor, gate: Tensor, sizes: list[int], out: Tensor
) -> None:
    """The same without gradients, some tokens at a time, added to their places in `out`."""
    hit, start = [e for e, size in enumerate(sizes) if size], 0
    for expert, own in zip(hit, _weights(module, hit), strict=True):
        stop = start + sizes[expert]
        for first in range(start, stop, _TOKENS_AT_ONCE):
            rows = slice(first, min(stop, first + _TOKENS_AT_ONCE))
            y = _expert(module, x.index_select(0, token[rows]), own)
            out.index_add_(0, token[rows], y.to(out.dtype).mul_(gate[rows]))
        start = stop


_Own = dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]
"""One expert's tensors by matrix: u, v, rows (or dense S), their places (None: all), bias."""


def expert_output(experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What stored expert `expert` of a factored module makes of tokens x, before gate weights."""
    return _expert(experts, x, next(_weights(experts, [expert])))


def _weights(experts: nn.Module, hit: Sequence[int]) -> Iterator[_Own]:
    """The tensors of each of these stored experts."""
    params: Any = experts._parameters
    parts = []
    for m in matrices(experts):
        places: list[Tensor | None] = [None] * len(hit)
        biases: list[Tensor | None] = [None] * len(hit)
        if is_open(experts):
            rows = _each(params[f"{m}_s"], hit)
        else:
            edges, every = _places(experts, m)
            places = [every[e] for e in hit]
            rows = _cut(params[f"{m}_rows"], edges, hit)
        if f"{m}_bias" in params:
            biases = [*_each(params[f"{m}_bias"], hit)]
        us, vs = _each(params[f"{m}_u"], hit), _each(params[f"{m}_v"], hit)
        parts.append([(m, own) for own in zip(us, vs, rows, places, biases, strict=True)])
    return (dict(own) for own in zip(*parts, strict=True))


def _each(tensor: Tensor, hit: Sequence[int]) -> list[Tensor]:
    """The experts of a stacked tensor; with gradients by one operation, with one gradient."""
    if torch.is_grad_enabled():
        every = tensor.unbind(0)
        return [every[e] for e in hit]
    return [tensor.select(0, e) for e in hit]


def _cut(tensor: Tensor, edges: list[int], hit: Sequence[int]) -> list[Tensor]:
    """The same of a tensor in which the experts have parts of different lengths."""
    if torch.is_grad_enabled():
        every = tensor.split([b - a for a, b in pairwise(edges)])
        return [every[e] for e in hit]
    return [tensor.narrow(0, edges[e], edges[e + 1] - edges[e]) for e in hit]


def _places(experts: nn.Module, m: str) -> tuple[list[int], Sequence[Tensor]]:
    """Where each expert's rows of S begin, and which rows they are; made once for these ids."""
    ids: Any = experts._buffers[f"{m}_row_ids"]
    version = 0 if ids.is_inference() else ids._version
    cache = experts.__dict__.setdefault("_smelt_places", {})
    if m not in cache or cache[m][0] is not ids or cache[m][1] != version:
        params: Any = experts._parameters
        G, out = params[f"{m}_u"].shape[:2]
        sizes = torch.bincount(ids.long() // out, minlength=G).tolist()
        cache[m] = (ids, version, [0, *accumulate(sizes)], (ids.long() % out).split(sizes))
    return cache[m][2], cache[m][3]


def _expert(module: Any, x: Tensor, own: _Own) -> Tensor:
    hidden = _activated(module, {m: _product(x, *own[m]) for m in own if m != "down"})
    return _finished(module, _product(hidden, *own["down"]))


def _product(
    x: Tensor, u: Tensor, v: Tensor, rows: Tensor, places: Tensor | None, bias: Tensor | None
) -> Tensor:
    x = x.to(v.dtype)
    if len(x) == 1 and places is not None and _vectors_serve(x):
        return _product_of_one(x[0], u, v, rows, places, bias)[None]
    y = linear(linear(x, v), u, bias)
    if places is None:
        return y + linear(x, rows)
    return y.index_add_(1, places, linear(x, rows)) if len(places) else y


def _vectors_serve(x: Tensor) -> bool:
    """Whether products of a matrix and a vector are the faster ones for a row: not in float16."""
    is_plain = x.dtype == torch.float32 and x.device.type == "cpu"
    return is_plain and not torch.is_grad_enabled()


def _product_of_one(
    x: Tensor, u: Tensor, v: Tensor, rows: Tensor, places: Tensor, bias: Tensor | None
) -> Tensor:
    inner = torch.mv(v, x)
    y = torch.mv(u, inner) if bias is None else torch.addmv(bias, u, inner)
    return y.index_add_(0, places, torch.mv(rows, x)) if len(places) else y


def _activated(module: Any, parts: Mapping[str, Tensor]) -> Tensor:
    """Hidden units by the family's own activation."""
    own: Any = module
    if isinstance(module, nn.ModuleDict):
        hidden = _elementwise(own.act, parts["up"])
        return own.dropout(hidden) if own.training else hidden
    if "gate" not in parts:
        return _elementwise(module.act_fn, parts["up"])
    if type(own)._apply_gate.__name__ == "_default_apply_gate":  # transformers': needs no joining
        hidden = _elementwise(own.act_fn, parts["gate"])
        return hidden * parts["up"] if torch.is_grad_enabled() else hidden.mul_(parts["up"])
    both = [parts["gate"], parts["up"]]
    joined = torch.cat(both, -1) if module.is_concatenated else torch.stack(both, -1).flatten(-2)
    return module._apply_gate(joined)


def _elementwise(function: Any, x: Tensor) -> Tensor:
    """An activation; without gradients in the memory of x, which is the caller's own."""
    if not torch.is_grad_enabled():
        if type(function) is nn.ReLU:
            return x.relu_()
        if type(function) is nn.SiLU:
            return silu(x, inplace=True)
    return function(x)


def _finished(module: Any, y: Tensor) -> Tensor:
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


# --- on a GPU ------------------------------------------------------------------------------------


def _kernel_serves(experts: Any, x: Tensor) -> bool:
    """Whether torch's grouped product takes these shapes: a GPU of 2020 or later, 16-byte rows."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    factors = [t for n, t in experts._parameters.items() if n.endswith(("_u", "_v"))]
    return all(t.shape[1] * t.element_size() % 16 == 0 for t in factors) and all(
        t.shape[2] * t.element_size() % 16 == 0 for t in factors
    )


def _grouped(module: Any, x: Tensor, sizes: list[int]) -> Tensor:
    """Outputs of rows in order of their expert: U and V by a grouped product, S by expert."""
    G = len(sizes)
    counts = torch.tensor(sizes, device=x.device)
    offsets = counts.cumsum(0, dtype=torch.int32)
    expert = torch.repeat_interleave(torch.arange(G, device=x.device), counts)
    hit = [e for e, size in enumerate(sizes) if size]
    own = dict(zip(hit, _weights(module, hit), strict=True))

    def product(x: Tensor, m: str) -> Tensor:
        u, v = module._parameters[f"{m}_u"], module._parameters[f"{m}_v"]
        x = x.to(v.dtype)
        inner = grouped_mm(x, v.transpose(1, 2), offs=offsets)
        y = grouped_mm(inner, u.transpose(1, 2), offs=offsets)
        blocks = []
        lengths = [sizes[e] for e in hit]
        for e, low, block in zip(hit, y.split(lengths), x.split(lengths), strict=True):
            _, _, rows, places, _ = own[e][m]
            sparse = linear(block, rows)
            blocks.append(low + sparse if places is None else low.index_add(1, places, sparse))
        y = torch.cat(blocks) if blocks else y
        bias = module._parameters.get(f"{m}_bias")
        return y if bias is None else y + bias[expert]

    hidden = _activated(module, {m: product(x, m) for m in matrices(module) if m != "down"})
    return _finished(module, product(hidden, "down"))
