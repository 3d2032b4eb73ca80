"""Bytes that a step of any model reads, counted from its modules.

A step reads the parameters that its operations touch (one step is watched): of experts, those that
are reached; of an embedding, a row for each token; and what the cache holds. Buffers (rotary
tables, maps) are small and left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from smelt.bench.reached import reached
from smelt.bench.state import State
from smelt.bench.traffic import Seen, Work
from smelt.checkpoint.bind import MoeLayer
from smelt.checkpoint.measure import expert_sizes
from smelt.samoe import count


@dataclass(frozen=True)
class TreeCost:
    """Of a model whose modules say what they read."""

    params: int  # shared ones once
    whole_values: int  # read whole by every step: attention, norms, routers, the head
    row_values: int  # of tables, for each token
    experts: tuple[Tensor, ...]  # by MoE layer, values of each stored expert [G]
    top_k: tuple[int, ...]
    runs: tuple[bool, ...]  # by MoE layer, whether a step comes through it: not in an encoder

    @property
    def active_params(self) -> float:
        """All but the experts that a token does not choose; those of a layer count alike."""
        idle = 0.0
        for sizes, K in zip(self.experts, self.top_k, strict=True):
            idle += float(sizes.mean()) * max(0, len(sizes) - K)
        return self.params - idle

    def step(
        self,
        batch: int,
        context: int,  # noqa: ARG002  (the cache that was seen says what it holds)
        hit: Sequence[float] | Sequence[Tensor] | None = None,
        kept: Sequence[int] | None = None,
        seen: Seen | None = None,
    ) -> Work:
        """One step; there is no pool, so `kept` is None. Without `seen`: no cache, no FLOPs."""
        assert kept is None, "only SaMoE has pool entries to leave out"
        layers = zip(self.experts, self.top_k, self.runs, strict=True)
        uniform = [
            count.distinct_experts(len(sizes), min(K, len(sizes)), batch) if runs else 0.0
            for sizes, K, runs in layers
        ]
        reached: list[float | Tensor] = [*(uniform if hit is None else hit)]
        read = 0.0
        for sizes, of_layer in zip(self.experts, reached, strict=True):
            read += _values(sizes, of_layer)
        cached, flops, expert_flops = (
            (seen.cached_values, seen.flops, seen.expert_flops) if seen else (0.0, 0.0, 0.0)
        )
        return Work(
            expert_values=read,
            expert_flops=expert_flops,
            other_values=self.whole_values + batch * self.row_values + cached,
            other_flops=flops - expert_flops,
            resident_values=self.whole_values + read,
        )


def _values(sizes: Tensor, hit: float | Tensor) -> float:
    """Of so many experts of average size, or of each as often as it is reached."""
    if isinstance(hit, Tensor):
        return float(sizes @ hit.to(sizes))
    return float(sizes.mean()) * hit


_BATCH = 3
"""Sequences of the step that is tried: tables read for each of them are read three times."""


@torch.no_grad()
def tree_cost(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> TreeCost:
    """The cost of a model on its device: what a step reads beside the experts is tried out."""
    sizes = {layer.experts: expert_sizes(model.get_submodule(layer.experts)) for layer in layers}
    of_experts = {id(p) for _, own in sizes.values() for p in own}
    others = [p for p in model.parameters() if id(p) not in of_experts]
    tokens = torch.zeros(_BATCH, 1, dtype=torch.long, device=next(model.parameters()).device)
    state = State(model, tokens[:1], _BATCH)
    with reached(model, layers) as calls, _Reads(others) as reads:
        state.step(tokens)
    whole = sum(p.numel() for p in others if _address(p) in reads.whole)
    # a table of positions is read once for all sequences
    by_token = [width for rows, width in reads.rows if rows % _BATCH == 0]
    return TreeCost(
        params=sum(p.numel() for p in model.parameters()),
        whole_values=whole + sum(rows * width for rows, width in reads.rows if rows % _BATCH),
        row_values=sum(by_token),
        experts=tuple(sizes[layer.experts][0] for layer in layers),
        top_k=tuple(layer.top_k for layer in layers),
        runs=tuple(bool(of_layer) for of_layer in calls),
    )


class _Reads(TorchDispatchMode):
    """Within: which parameters operations read: whole, or rows of them by ids.

    An operation that gives a view back has read nothing yet.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = {_address(p) for p in parameters}
        self.whole: set[int] = set()
        self.rows: list[tuple[int, int]] = []  # how many, of which width

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = {_address(t) for t in tree_leaves(found) if isinstance(t, Tensor)}
        if func is torch.ops.aten.embedding.default:
            self.rows.append((args[1].numel(), args[0].shape[1]))
        else:
            self.whole |= {_address(t) for t in given} & self._watched - made
        return found


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
