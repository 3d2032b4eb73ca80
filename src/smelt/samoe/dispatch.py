"""From router logits to rows grouped by expert: choices, capacity, order.

Letters: B sequences, T tokens of each, N = B·T, K choices, E experts, R (token, choice) pairs kept.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smelt.routing import Routing


def choose(logits: Float[Tensor, "N E"], num_choices: int, *, is_normalised: bool) -> Routing:
    """The K experts of highest probability per token, the lower id where two are equal.

    The gate weights are the softmax over all experts, in float32, divided by their sum if asked.
    """
    weight, choice = logits.float().softmax(-1).topk(num_choices)
    if is_normalised:
        weight = weight / weight.sum(-1, keepdim=True)
    return Routing(choice, weight, logits)


def capacity(factor: float, num_choices: int, num_tokens: int, num_experts: int) -> int:
    """How many tokens of a sequence an expert takes: max(4, ⌈Q·K·T/E⌉)."""
    return max(4, math.ceil(factor * num_choices * num_tokens / num_experts))


def within_capacity(
    choice: Int[Tensor, "B T K"], real: Bool[Tensor, "B T"], num_experts: int, limit: int
) -> Bool[Tensor, "B T K"]:
    """Which choices fit: the first `limit` of each expert in each sequence.

    First choices of all tokens go before second choices; within them the earlier token goes first.
    Padding takes no place.
    """
    B, T, K = choice.shape
    sequence = torch.arange(B, device=choice.device)[:, None, None]
    place = choice + sequence * num_experts
    place = place.masked_fill(~real[:, :, None], B * num_experts)  # padding queues by itself
    queue = place.transpose(1, 2).reshape(-1)  # by sequence, choice, token
    order = queue.argsort(stable=True)
    sizes = torch.bincount(queue, minlength=B * num_experts + 1)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(queue)
    rank[order] = torch.arange(len(queue), device=queue.device) - starts[queue[order]]
    fits = (rank < limit).view(B, K, T).transpose(1, 2)
    return fits & real[:, :, None]


@dataclass(frozen=True)
class Dispatch:
    """R kept (token, choice) pairs in order of their expert."""

    token: Int[Tensor, " R"]
    weight: Float[Tensor, " R"]
    sizes: Int[Tensor, " E"]  # rows of each expert


def dispatch(routing: Routing, kept: Bool[Tensor, "N K"] | None, num_experts: int) -> Dispatch:
    """The pairs that are kept (None: all), grouped by expert, tokens in order within a group."""
    num_choices = routing.choice.shape[1]
    expert, weight = routing.choice.flatten(), routing.weight.flatten()
    if kept is None:
        order = expert.argsort(stable=True)
    else:
        pairs = kept.flatten().nonzero().squeeze(1)
        order = pairs[expert[pairs].argsort(stable=True)]
    expert = expert[order]
    sizes = torch.bincount(expert, minlength=num_experts)
    return Dispatch(order // num_choices, weight[order], sizes)
