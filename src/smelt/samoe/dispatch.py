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
    probability = logits.float().softmax(-1)
    choice = largest(probability, num_choices)
    weight = probability.gather(1, choice)
    if is_normalised:
        weight = weight / weight.sum(-1, keepdim=True)
    return Routing(choice, weight, logits)


@torch.no_grad()
def largest(values: Float[Tensor, "N E"], count: int) -> Int[Tensor, "N K"]:
    """The ids of the K largest of each row, the lower one where two are equal.

    `topk` promises no order of equal values, and is slower for the small K of routers.
    """
    found: list[Tensor] = []
    for _ in range(count):
        if found:
            values = values.scatter(1, found[-1], -math.inf)
        found.append(values.argmax(-1, keepdim=True))
    return torch.cat(found, 1)


def capacity(
    factor: float, num_choices: int, num_tokens: Int[Tensor, " B"], num_experts: int
) -> Int[Tensor, " B"]:
    """How many tokens of each sequence an expert takes: max(4, ⌈Q·K·T/E⌉).

    Args:
        num_tokens: T, the real tokens of each sequence; padding gives no places.
    """
    exact = factor * num_choices * num_tokens.double() / num_experts
    return exact.ceil().long().clamp(min=4)


def within_capacity(
    choice: Int[Tensor, "B T K"],
    real: Bool[Tensor, "B T"],
    num_experts: int,
    limit: Int[Tensor, " B"],
) -> Bool[Tensor, "B T K"]:
    """Which choices fit: the first `limit[b]` of each expert in sequence b.

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
    fits = rank.view(B, K, T).transpose(1, 2) < limit[:, None, None]
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
