"""The losses of training, and what a routing looks like: functions of one forward's outputs."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from smelt.text.spans import IGNORED


def targets(labels: Int[Tensor, "B T"], is_causal: bool) -> Int[Tensor, "B T"]:
    """The token each position predicts, -100 where there is none.

    Causal models predict the next token, so that the last position predicts nothing; the labels of
    encoder–decoder models are in place already.
    """
    if not is_causal:
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def token_loss(logits: Float[Tensor, "B T V"], target: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean nats of the predicted tokens."""
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED)


def load_balance(
    router_logits: Sequence[Float[Tensor, "... E"]], num_choices: int
) -> Float[Tensor, ""]:
    """How unevenly the layers load their experts: 1 is even, E is one expert for everything.

    The mean over layers of E · Σ_e (share of choices of e) · (mean probability of e).

    Source: Switch Transformer, arXiv:2101.03961, Eq. 4. Differs from transformers'
    `load_balancing_loss_func`, which takes all layers as one and so lets one layer's uneven load
    make up for another's; here each layer is balanced for itself.
    """
    losses = []
    for logits in router_logits:
        probability = logits.flatten(0, -2).float().softmax(-1)
        num_experts = probability.shape[-1]
        chosen = probability.topk(num_choices).indices.flatten()
        share = torch.bincount(chosen, minlength=num_experts) / len(chosen)
        losses.append(num_experts * (share * probability.mean(0)).sum())
    return torch.stack(losses).mean()


def expert_counts(
    router_logits: Sequence[Float[Tensor, "... E"]], num_choices: int
) -> list[Int[Tensor, " E"]]:
    """Per layer, how often each expert is among the K with the highest logits.

    A selection bias or group-limited routing (deepseek_v3) is not seen here.
    """
    return [
        torch.bincount(
            logits.flatten(0, -2).topk(num_choices).indices.flatten(), minlength=logits.shape[-1]
        )
        for logits in router_logits
    ]


def routing_entropy(counts: Int[Tensor, " E"]) -> float:
    """The entropy of the experts' load as a share of log E: 1 is even, 0 is one expert."""
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum()) / math.log(len(counts))


def unigram_nats(train: Int[Tensor, " S"], held_out: Int[Tensor, " U"], vocab_size: int) -> float:
    """Mean nats of held-out tokens under the frequencies of the train tokens, each count plus 1."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[held_out].mean())
