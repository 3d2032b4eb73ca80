"""Which experts a step reaches, whatever the family."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smelt.checkpoint.bind import MoeLayer
from smelt.checkpoint.observe import reached as reached_of_stock
from smelt.samoe.model import SaMoEForCausalLM
from smelt.samoe.moe import Router


@contextmanager
def reached(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> Iterator[list[list[Tensor]]]:
    """Within: by MoE layer, the ids of the distinct stored experts that each call reaches.

    Args:
        layers: the MoE layers, of anything but SaMoE (which knows its own).
    """
    if not isinstance(model, SaMoEForCausalLM):
        with reached_of_stock(model, layers) as found:
            yield found
        return
    logits: list[Tensor] = []

    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [r.register_forward_hook(lambda _, given, out: logits.append(out)) for r in routers]
    num_layers, K = len(model.config.layout.layers), model.config.num_experts_per_tok
    of_samoe: list[list[Tensor]] = [[] for _ in range(num_layers)]
    try:
        yield of_samoe
    finally:
        for hook in hooks:
            hook.remove()
        for call, values in enumerate(logits):  # layers one after another, forward by forward
            of_samoe[call % num_layers].append(values.topk(K).indices.unique())


def how_often(calls: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
    """By MoE layer, the share of its calls that reach each stored expert [G]; their sum is U."""
    found = []
    for layer, size in zip(calls, sizes, strict=True):
        share = torch.zeros(size, dtype=torch.float64)
        for ids in layer:
            share[ids.cpu()] += 1 / len(layer)
        found.append(share)
    return found
