"""Bytes that a step of any model reads, counted from its modules.

A step reads every parameter of the modules that it runs: of experts, those that are reached; of an
embedding, a row for each token; and what the cache holds. Buffers (rotary tables, maps) are small
and left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
        uniform = [
            count.distinct_experts(len(sizes), min(K, len(sizes)), batch)
            for sizes, K in zip(self.experts, self.top_k, strict=True)
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


@torch.no_grad()
def tree_cost(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> TreeCost:
    """The cost of a model on its device: which of its modules a step runs is tried out."""
    experts = {layer.experts: model.get_submodule(layer.experts) for layer in layers}
    sizes = {name: expert_sizes(module) for name, module in experts.items()}
    of_experts = {id(p) for _, own in sizes.values() for p in own}
    ran = _run_in_a_step(model)
    whole: dict[int, int] = {}
    rows = 0
    for module in ran:
        if isinstance(module, nn.Embedding):
            rows += module.embedding_dim
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in of_experts:
                whole[id(parameter)] = parameter.numel()
    return TreeCost(
        params=sum(p.numel() for p in model.parameters()),
        whole_values=sum(whole.values()),
        row_values=rows,
        experts=tuple(sizes[layer.experts][0] for layer in layers),
        top_k=tuple(layer.top_k for layer in layers),
    )


def _run_in_a_step(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that a cached step runs, or whose weights the module above them uses itself.

    A projection or a table that is not called is not read (the keys of an encoder's output lie in
    the cache), and neither is what lies inside something that is not called (an image tower). Other
    leaves are read by the module above them: a convolution whose state is in the cache.
    """
    device = next(model.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    state = State(model, token, 1)
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in model.modules()]
    try:
        state.step(token)
    finally:
        for hook in hooks:
            hook.remove()
    found = list(called)
    for module in called:
        for child in module.children():
            is_leaf = next(child.children(), None) is None
            if child not in called and is_leaf and not isinstance(child, nn.Linear | nn.Embedding):
                found.append(child)
    return found
