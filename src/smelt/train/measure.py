"""What training reached: held-out loss beside the unigram loss, and the experts' load."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smelt.checkpoint.bind import find_layers
from smelt.errors import CheckpointError, RecipeError
from smelt.text import TokenBlocks
from smelt.text.spans import IGNORED
from smelt.train import losses
from smelt.train.data import Example


@dataclass(frozen=True)
class HeldOut:
    """One held-out source as examples."""

    name: str
    examples: list[Example]
    blocks: TokenBlocks


def forward(model: PreTrainedModel, inputs: Example) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, the token each position predicts, and the router logits of every MoE layer."""
    is_causal = not model.config.is_encoder_decoder
    ids = {key: value for key, value in inputs.items() if key != "labels"}
    if is_causal and bool(ids["attention_mask"].all()):
        del ids["attention_mask"]  # nothing is padded: the causal kernel alone is faster
    outputs = model(**ids, output_router_logits=True, use_cache=False)
    router_logits: list[Tensor] = []
    for name in ("router_logits", "encoder_router_logits", "decoder_router_logits"):
        router_logits += [one for one in outputs.get(name) or () if isinstance(one, Tensor)]
    return outputs.logits, losses.targets(inputs["labels"], is_causal), router_logits


def num_choices(model: PreTrainedModel) -> int:
    """K, experts per token; a model without experts is a RecipeError."""
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
    """The model's loss on every held-out source, and where its routers sent the tokens."""
    model.eval()
    choices = num_choices(model)
    device = next(model.parameters()).device
    nats: dict[str, float] = {}
    num_predicted: dict[str, int] = {}
    counts: list[Tensor] = []
    for one in held_out:
        total, number = 0.0, 0
        for at in range(0, len(one.examples), batch_size):
            rows = one.examples[at : at + batch_size]
            batch = {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}
            logits, target, router_logits = forward(model, batch)
            predicted = int((target != IGNORED).sum())
            total += float(losses.token_loss(logits, target)) * predicted
            number += predicted
            new = losses.expert_counts(router_logits, choices)
            counts = [a + b for a, b in zip(counts, new, strict=True)] if counts else new
        nats[one.name], num_predicted[one.name] = total / number, number
    return Measured(nats, num_predicted, [layer.cpu() for layer in counts])


def report(
    model: PreTrainedModel,
    examples: Sequence[Example],
    held_out: Sequence[HeldOut],
    batch_size: int,
) -> dict[str, Any]:
    """Loss, unigram loss and bits per byte of every held-out source, and the routing over all.

    The unigram has the frequencies of the predicted train tokens, each count plus 1. Bits per byte
    are those of all tokens at the mean loss of the predicted ones (a sequence's first is not).
    """
    measured = measure(model, held_out, batch_size)
    is_causal = not model.config.is_encoder_decoder
    seen = _predicted(examples, is_causal)
    by_source = {}
    for one in held_out:
        nats = measured.nats[one.name]
        unigram = losses.unigram_nats(
            seen, _predicted(one.examples, is_causal), int(model.config.vocab_size)
        )
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


def _predicted(examples: Sequence[Example], is_causal: bool) -> Tensor:
    """The tokens that are predicted, in one row."""
    target = losses.targets(torch.stack([one["labels"] for one in examples]), is_causal)
    return target[target != IGNORED]
