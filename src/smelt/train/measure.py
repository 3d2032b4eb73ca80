"""What training reached: held-out loss beside the unigram loss, and the experts' load."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smelt import processes
from smelt.checkpoint.bind import find_layers
from smelt.errors import CheckpointError, RecipeError
from smelt.text import TokenBlocks
from smelt.text.spans import IGNORED
from smelt.train import distributed, losses
from smelt.train.data import Example


@dataclass(frozen=True)
class HeldOut:
    """One held-out source as examples."""

    name: str
    examples: list[Example]
    blocks: TokenBlocks


@dataclass(frozen=True)
class Outputs:
    """One forward: B sequences of T tokens."""

    logits: Tensor  # [B, T, V]
    target: Tensor  # [B, T], the token each position predicts, -100 where there is none
    router_logits: list[Tensor]  # of every MoE layer
    dropped: Tensor | None  # samoe: share of choices dropped, per MoE layer


def predicted(inputs: Example, *, is_causal: bool) -> Tensor:
    """The token each position predicts, -100 where there is none; labels left out are the input."""
    return losses.targets(inputs.get("labels", inputs["input_ids"]), is_causal)


def predicts_next(model: PreTrainedModel) -> bool:
    """Whether the model predicts the next token, and not the labels in place."""
    return not model.config.is_encoder_decoder and getattr(model.config, "is_causal", True)


def forward(model: PreTrainedModel, inputs: Example) -> Outputs:
    """The model's outputs on a batch."""
    ids = {key: value for key, value in inputs.items() if key != "labels"}
    if "attention_mask" in ids and bool(ids["attention_mask"].all()):
        del ids["attention_mask"]  # nothing is padded: the kernel without a mask is faster
    outputs = model(**ids, output_router_logits=True, use_cache=False)
    router_logits: list[Tensor] = []
    for name in ("router_logits", "encoder_router_logits", "decoder_router_logits"):
        router_logits += [one for one in outputs.get(name) or () if isinstance(one, Tensor)]
    target = predicted(inputs, is_causal=predicts_next(model))
    return Outputs(outputs.logits, target, router_logits, outputs.get("dropped"))


def is_samoe(model: PreTrainedModel) -> bool:
    """Whether it is a model of ours, which may have no experts at all."""
    return str(model.config.model_type) == "samoe"


def num_choices(model: PreTrainedModel) -> int:
    """K, experts per token; a stock model without experts is a RecipeError."""
    if is_samoe(model):
        return int(model.config.num_experts_per_tok)
    try:
        return find_layers(model)[0].top_k
    except CheckpointError as error:
        raise RecipeError(f"model.model_type cannot be trained here. {error}") from None


@dataclass(frozen=True)
class Measured:
    """Held-out loss and routing of a model."""

    nats: dict[str, float]  # per predicted token, by source
    num_predicted: dict[str, int]
    counts: list[Tensor]  # per layer, tokens routed to each expert, over all sources

    @property
    def entropies(self) -> list[float]:
        """Routing entropy per layer, as a share of uniform."""
        return [round(losses.routing_entropy(layer), 4) for layer in self.counts]


@torch.no_grad()
def measure(model: PreTrainedModel, held_out: Sequence[HeldOut], batch_size: int) -> Measured:
    """The model's loss on every held-out source, and where its routers sent the tokens.

    The model is left in evaluation mode. Several processes share the sequences, and all call it.

    Args:
        model: any language model with experts.
        held_out: the sources.
        batch_size: sequences at a time, of each process.
    """
    model.eval()
    choices = num_choices(model)
    device = next(model.parameters()).device
    nats: dict[str, float] = {}
    num_predicted: dict[str, int] = {}
    counts: list[Tensor] = []
    for one in held_out:
        total = number = 0.0
        for at in range(0, len(one.examples), batch_size * processes.num_processes()):
            begin = at + batch_size * processes.rank()
            rows = one.examples[begin : begin + batch_size]
            is_idle = not rows  # it takes part in gathering the weights all the same
            rows = rows or one.examples[:1]
            batch = {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}
            with distributed.precision(model):
                outputs = forward(model, batch)
            new = losses.expert_counts(outputs.router_logits, choices)
            if is_idle:
                new = [torch.zeros_like(layer) for layer in new]
            else:
                number += int((outputs.target != IGNORED).sum())
                total += float(losses.token_loss(outputs.logits, outputs.target, 1))
            counts = [a + b for a, b in zip(counts, new, strict=True)] if counts else new
        whole = torch.tensor([total, number], dtype=torch.float64, device=device)
        total, number = processes.total([whole])[0].tolist()
        nats[one.name], num_predicted[one.name] = total / number, int(number)
    return Measured(nats, num_predicted, [layer.cpu() for layer in processes.total(counts)])


def report(
    model: PreTrainedModel,
    train_counts: Tensor,
    held_out: Sequence[HeldOut],
    batch_size: int,
) -> dict[str, Any]:
    """Loss, unigram loss and bits per byte of every held-out source, and the routing over all.

    The unigram has the frequencies of the train tokens, each count plus 1. Bits per byte are those
    of all tokens at the mean loss of the predicted ones (a sequence's first is not); a loss on
    corrupted text has none.

    Args:
        model: any language model with experts.
        train_counts: how often each token is a label of the training set.
        held_out: the sources.
        batch_size: sequences at a time.
    """
    measured = measure(model, held_out, batch_size)
    is_causal = predicts_next(model)
    by_source = {}
    for one in held_out:
        nats = measured.nats[one.name]
        unigram = losses.unigram_nats(train_counts, _labels(one.examples, is_causal))
        by_source[one.name] = {
            "predicted_tokens": measured.num_predicted[one.name],
            "nats_per_token": nats,
            "unigram_nats_per_token": unigram,
            "share_of_unigram": nats / unigram,
            "bits_per_byte": nats * one.blocks.num_tokens / one.blocks.num_bytes / math.log(2)
            if is_causal
            else None,
            "text_sha256": one.blocks.sha256,
        }
    return {
        "held_out": by_source,
        "unigram": "frequencies of the train tokens, each count plus 1",
        "routing_entropy_share_of_uniform": measured.entropies,
        "expert_counts": [layer.tolist() for layer in measured.counts],
    }


def label_counts(examples: Sequence[Example], vocab_size: int) -> Tensor:
    """How often each token is a label of the examples."""
    labels = _labels(examples, is_causal=False)
    return torch.bincount(labels, minlength=vocab_size)


def _labels(examples: Sequence[Example], is_causal: bool) -> Tensor:
    """The tokens that are predicted, in one row."""
    target = losses.targets(torch.stack([one["labels"] for one in examples]), is_causal)
    return target[target != IGNORED]
