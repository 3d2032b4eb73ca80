"""The losses of training, and what a routing looks like: functions of one forward's outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from smelt.text.spans import IGNORED


def targets(labels: Int[Tensor, "B T"], is_causal: bool) -> Int[Tensor, "B T"]:
    """The token each position predicts, -100 where there is none.

    Causal models predict the next token, so that the last position predicts nothing; the labels of
    encoder–decoder and masked models are in place already.
    """
    if not is_causal:
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def token_loss(
    logits: Float[Tensor, "B T V"],
    target: Int[Tensor, "B T"],
    num_predicted: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean nats of the predicted tokens; with `num_predicted`, their sum divided by that."""
    reduction = "mean" if num_predicted is None else "sum"
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED, reduction=reduction
    )
    return loss if num_predicted is None else loss / num_predicted


@dataclass(frozen=True)
class Routed:
    """What one layer's router did with N tokens, as sums over them."""

    counts: Float[Tensor, " E"]  # how often each expert was chosen; whole numbers, no gradient
    probability: Float[Tensor, " E"]
    squared_log_z: Float[Tensor, ""]  # of the softmax's denominator


def routed(
    router_logits: Sequence[Float[Tensor, "... E"]], num_choices: int, *, with_z: bool = False
) -> list[Routed]:
    """Per layer, sums over its tokens of the K choices with the highest logits and of the softmax.

    A selection bias or group-limited routing (deepseek_v3) is not seen here.
    """
    found = []
    for logits in router_logits:
        flat = logits.flatten(0, -2).float()
        probability = flat.softmax(-1).sum(0)
        log_z = flat.logsumexp(-1).square().sum() if with_z else flat.new_zeros(())
        found.append(Routed(_counts(flat, num_choices), probability, log_z))
    return found


def _counts(logits: Float[Tensor, "N E"], num_choices: int) -> Float[Tensor, " E"]:
    logits = logits.detach()
    chosen = logits.argmax(-1) if num_choices == 1 else logits.topk(num_choices).indices.flatten()
    # Not bincount, which waits for the GPU to learn its size; sums of ones are exact in any order.
    ones = torch.ones((), device=logits.device).expand(len(chosen))
    return torch.zeros(logits.shape[-1], device=logits.device).scatter_add_(0, chosen, ones)


def layer_balance(part: Routed, counts: Float[Tensor, " E"], num_choices: int) -> Float[Tensor, ""]:
    """One layer's load balance, or a part's share of it: 1 is even, E is one expert for everything.

    E · Σ_e (share of choices of e) · (mean probability of e), shares and means over all tokens that
    `counts` counts. As the shares have no gradient, the balance of parts of a batch (micro-batches,
    processes) adds up to that of the whole, and so do their gradients.

    Args:
        part: the tokens at hand.
        counts: choices of each expert over the whole batch.
        num_choices: K.

    Source: Switch Transformer, arXiv:2101.03961, Eq. 4.
    """
    chosen = counts.sum()
    return len(counts) * num_choices * (counts * part.probability).sum() / chosen.square()


def load_balance(
    router_logits: Sequence[Float[Tensor, "... E"]], num_choices: int
) -> Float[Tensor, ""]:
    """The mean of the layers' balances.

    Differs from transformers' `load_balancing_loss_func`, which takes all layers as one and so lets
    one layer's uneven load make up for another's; here each layer is balanced for itself.
    """
    parts = routed(router_logits, num_choices)
    return torch.stack([layer_balance(part, part.counts, num_choices) for part in parts]).mean()


def expert_counts(
    router_logits: Sequence[Float[Tensor, "... E"]], num_choices: int
) -> list[Int[Tensor, " E"]]:
    """Per layer, how often each expert is among the K with the highest logits."""
    return [_counts(logits.flatten(0, -2), num_choices).long() for logits in router_logits]


def routing_entropy(counts: Float[Tensor, " E"] | Int[Tensor, " E"]) -> float:
    """The entropy of the experts' load as a share of log E: 1 is even, 0 is one expert.

    One expert alone is loaded evenly: 1.
    """
    if len(counts) == 1:
        return 1.0
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum()) / math.log(len(counts))


def unigram_nats(train: Int[Tensor, " V"], held_out: Int[Tensor, " U"]) -> float:
    """Mean nats of held-out tokens under the counts of the train tokens, each count plus 1."""
    counts = train.double() + 1
    return float(-(counts / counts.sum()).log()[held_out].mean())
