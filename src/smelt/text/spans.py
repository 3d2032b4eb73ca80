"""Span corruption: what an encoder–decoder model is trained, calibrated and evaluated on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smelt.errors import CalibrationError
from smelt.text.blocks import TokenBlocks

IGNORED = -100  # a label that is not predicted


@dataclass(frozen=True)
class SpanBlocks:
    """Sequences with spans cut out for an encoder, and the spans for a decoder to restore."""

    input_ids: Int[Tensor, "B T"]  # a sentinel stands for each span
    mask: Bool[Tensor, "B T"]
    decoder_input_ids: Int[Tensor, "B U"]  # the labels, one place later
    decoder_mask: Bool[Tensor, "B U"]
    labels: Int[Tensor, "B U"]  # sentinel, span, sentinel, span, …, last sentinel; padding -100

    def examples(self) -> list[dict[str, Tensor]]:
        """Each sequence as an encoder–decoder model takes it."""
        return [
            {
                "input_ids": self.input_ids[i],
                "attention_mask": self.mask[i].long(),
                "decoder_input_ids": self.decoder_input_ids[i],
                "decoder_attention_mask": self.decoder_mask[i].long(),
                "labels": self.labels[i],
            }
            for i in range(len(self.input_ids))
        ]


def span_corruption(
    blocks: TokenBlocks,
    *,
    sentinel_ids: Sequence[int],
    density: float = 0.15,
    mean_span: float = 3.0,
    seed: int = 0,
    pad_id: int = 0,
    start_id: int = 0,
) -> SpanBlocks:
    """Sequences with a share of their tokens cut out in spans, and what was cut out.

    Span lengths and the gaps between them are uniform random compositions. A sequence needs one
    sentinel more than it has spans; where that is too many, it gets fewer, longer spans. Sequences
    shorter than three tokens are left out: they have no span with something around it.

    Args:
        blocks: the text.
        sentinel_ids: the tokens that stand for span 0, 1, …
        density: share of a sequence's tokens that is cut out.
        mean_span: mean length of a span, in tokens.
        seed: of the cuts.
        pad_id: what fills up short rows.
        start_id: the decoder's first input.

    Source: T5, arXiv:1910.10683, §3.1.4. Differs from T5's code in that spans are not merged
    across rows, and no end-of-sequence token is added.
    """
    if len(sentinel_ids) < 2 or not 0 < density < 1 or mean_span < 1:
        raise CalibrationError(
            f"Span corruption with {len(sentinel_ids)} sentinels, density {density}, mean span "
            f"{mean_span}: at least 2 sentinels, a density in (0, 1) and spans of 1 are needed."
        )
    generator = torch.Generator().manual_seed(seed)
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for ids, mask in zip(blocks.input_ids, blocks.mask, strict=True):
        tokens = ids[mask]
        if len(tokens) < 3:
            continue
        num_cut = min(max(round(len(tokens) * density), 1), len(tokens) - 1)
        num_spans = max(round(num_cut / mean_span), 1)
        num_spans = min(num_spans, len(sentinel_ids) - 1, len(tokens) - num_cut)
        spans = _composition(num_cut, num_spans, generator)
        gaps = _composition(len(tokens) - num_cut, num_spans, generator)
        kept, cut, at = [], [], 0
        for sentinel, gap, span in zip(sentinel_ids, gaps, spans, strict=False):
            mark = torch.tensor([sentinel])
            kept += [tokens[at : at + gap], mark]
            cut += [mark, tokens[at + gap : at + gap + span]]
            at += gap + span
        inputs.append(torch.cat(kept))
        labels.append(torch.cat([*cut, torch.tensor([sentinel_ids[num_spans]])]))
    if not inputs:
        raise CalibrationError("No sequence has three tokens: nothing to cut spans out of.")
    input_ids, mask = _rows(inputs, pad_id)
    label_ids, decoder_mask = _rows(labels, IGNORED)
    shifted = label_ids.roll(1, dims=1).masked_fill(~decoder_mask, pad_id)
    shifted[:, 0] = start_id
    return SpanBlocks(input_ids, mask, shifted, decoder_mask, label_ids)


def sentinels(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the tokenizer has them."""
    vocab: dict[str, int] = tokenizer.get_vocab()
    found: list[int] = []
    while (token := vocab.get(f"<extra_id_{len(found)}>")) is not None:
        found.append(token)
    return found


def _composition(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Positive integers that add up to `total`, every such list equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    bounds = [0, *cuts.tolist(), total]
    return [end - begin for begin, end in pairwise(bounds)]


def _rows(
    sequences: Sequence[Tensor], padding: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Sequences of different lengths as rows, padded at the end."""
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), True, padding)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]
