"""Token blocks as inputs of a model's forward: decoder-only, or encoder and decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smelt.checkpoint.source import Checkpoint
from smelt.errors import CalibrationError
from smelt.text import TokenBlocks
from smelt.text.spans import sentinels, span_corruption


@dataclass(frozen=True)
class Batch:
    """One batch: the forward's keyword arguments, and which tokens are real on each side."""

    inputs: dict[str, Tensor]
    mask: Tensor  # [B, T] of the decoder-only model, or of the encoder
    decoder_mask: Tensor | None = None
    labels: Tensor | None = None  # [B, T'] next-token targets, −100 where there is none

    def side(self, module_name: str) -> Tensor:
        """The mask of the tokens that a module of this name sees."""
        is_decoder = "decoder" in module_name.split(".")
        return self.decoder_mask if is_decoder and self.decoder_mask is not None else self.mask


def make_batches(
    checkpoint: Checkpoint, blocks: TokenBlocks, batch_size: int, seed: int = 0
) -> list[Batch]:
    """The blocks as batches, with the targets that a perplexity needs."""
    if checkpoint.config.is_encoder_decoder:
        return _encoder_decoder(checkpoint, blocks, batch_size, seed)
    batches = []
    for start in range(0, blocks.input_ids.shape[0], batch_size):
        ids = blocks.input_ids[start : start + batch_size]
        mask = blocks.mask[start : start + batch_size]
        inputs = {"input_ids": ids}
        if not bool(mask.all()):
            inputs["attention_mask"] = mask.long()
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], -100)
        batches.append(Batch(inputs, mask, labels=labels))
    return batches


def _encoder_decoder(
    checkpoint: Checkpoint, blocks: TokenBlocks, batch_size: int, seed: int
) -> list[Batch]:
    """Spans cut out for the encoder, restored by the decoder: what such models are trained on."""
    marks = sentinels(checkpoint.tokenizer)
    if len(marks) < 2:
        raise CalibrationError(
            f"{checkpoint.folder}: the tokenizer has no <extra_id_0>, <extra_id_1> … tokens, which "
            "an encoder–decoder model needs to be calibrated and evaluated by span corruption."
        )
    config = checkpoint.config
    spans = span_corruption(
        blocks,
        sentinel_ids=marks,
        seed=seed,
        pad_id=config.pad_token_id or 0,
        start_id=config.decoder_start_token_id or 0,
    )
    batches = []
    for start in range(0, spans.input_ids.shape[0], batch_size):
        rows = slice(start, start + batch_size)
        inputs = {
            "input_ids": spans.input_ids[rows],
            "attention_mask": spans.mask[rows].long(),
            "decoder_input_ids": spans.decoder_input_ids[rows],
            "decoder_attention_mask": spans.decoder_mask[rows].long(),
        }
        batches.append(
            Batch(inputs, spans.mask[rows], spans.decoder_mask[rows], spans.labels[rows])
        )
    return batches
