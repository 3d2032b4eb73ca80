"""Span corruption: what an encoder–decoder model is trained, calibrated and evaluated on."""

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smelt.errors import CalibrationError
from smelt.text.blocks import TokenBlocks
from smelt.text.cloze import cloze_questions
from smelt.text.recurring import Span, recurring_clusters, recurring_spans

IGNORED = -100  # a label that is not predicted
NUM_QUESTIONS = 4  # about a sequence, where it is asked about


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
    corruption = Corruption(
        tuple(sentinel_ids), density=density, mean_span=mean_span, pad_id=pad_id, start_id=start_id
    )
    return corruption.of_blocks(blocks, seed)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Which sequences are corrupted otherwise than in random spans; where one cannot be, it is.

    Source: of recurring spans `smelt.text.recurring`, of cloze questions `smelt.text.cloze`.
    """

    recurring: float  # share of the sequences of which spans are cut out that occur a second time
    cloze: float  # share of the sequences that get questions about themselves
    starts_word: Sequence[bool]  # of every token, whether a word may begin with it
    common: Collection[int]  # tokens that stand for nothing in particular


@dataclass(frozen=True)
class Corruption:
    """How sequences are corrupted; arguments as of `span_corruption`."""

    sentinel_ids: tuple[int, ...]
    _: KW_ONLY
    density: float
    mean_span: float
    pad_id: int = 0
    start_id: int = 0
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        if len(self.sentinel_ids) < 2 or not 0 < self.density < 1 or self.mean_span < 1:
            raise CalibrationError(
                f"Span corruption with {len(self.sentinel_ids)} sentinels, density {self.density}, "
                f"mean span {self.mean_span}: at least 2 sentinels, a density in (0, 1) and spans "
                "of 1 are needed."
            )

    def of_blocks(self, blocks: TokenBlocks, seed: int) -> SpanBlocks:
        """All sequences of a text, corrupted one after the other."""
        generator = torch.Generator().manual_seed(seed)
        tokens = [ids[mask] for ids, mask in zip(blocks.input_ids, blocks.mask, strict=True)]
        pairs = [
            self.of_one(own, generator, (seed, row))
            for row, own in enumerate(tokens)
            if len(own) >= 3
        ]
        if not pairs:
            raise CalibrationError("No sequence has three tokens: nothing to cut spans out of.")
        return self.together(pairs)

    def of_one(
        self, tokens: Int[Tensor, " T"], generator: torch.Generator, seed: Sequence[int]
    ) -> tuple[Int[Tensor, " K"], Int[Tensor, " U"]]:
        """What is read and what is predicted of one sequence.

        Args:
            tokens: three at least.
            generator: of the spans.
            seed: of cloze questions.
        """
        num_cut = min(max(round(len(tokens) * self.density), 1), len(tokens) - 1)
        spans: list[Span] = []
        if (own := self.mixture) is not None:
            drawn = float(torch.rand((), generator=generator))
            if drawn < own.cloze:
                asked = cloze_questions(
                    tokens.tolist(),
                    sentinel_ids=self.sentinel_ids,
                    starts_word=own.starts_word,
                    common=own.common,
                    num_questions=NUM_QUESTIONS,
                    seed=seed,
                )
                if asked is not None:
                    return torch.tensor(asked.input_ids), torch.tensor(asked.labels)
            elif drawn < own.cloze + own.recurring:
                spans = recurring_spans(
                    recurring_clusters(
                        tokens.tolist(), starts_word=own.starts_word, common=own.common
                    ),
                    max_tokens=num_cut,
                    max_spans=len(self.sentinel_ids) - 1,
                    generator=generator,
                )
        if not spans:
            num_spans = max(round(num_cut / self.mean_span), 1)
            num_spans = min(num_spans, len(self.sentinel_ids) - 1, len(tokens) - num_cut)
            spans = _random_spans(len(tokens), num_cut, num_spans, generator)
        return _cut(tokens, spans, self.sentinel_ids)

    def together(
        self, pairs: Sequence[tuple[Int[Tensor, " _k"], Int[Tensor, " _u"]]]
    ) -> SpanBlocks:
        """Corrupted sequences in rows of one length."""
        input_ids, mask = _rows([read for read, _ in pairs], self.pad_id)
        label_ids, decoder_mask = _rows([cut for _, cut in pairs], IGNORED)
        shifted = label_ids.roll(1, dims=1).masked_fill(~decoder_mask, self.pad_id)
        shifted[:, 0] = self.start_id
        return SpanBlocks(input_ids, mask, shifted, decoder_mask, label_ids)


def sentinels(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the tokenizer has them."""
    vocab: dict[str, int] = tokenizer.get_vocab()
    found: list[int] = []
    while (token := vocab.get(f"<extra_id_{len(found)}>")) is not None:
        found.append(token)
    return found


def _random_spans(
    num_tokens: int, num_cut: int, num_spans: int, generator: torch.Generator
) -> list[Span]:
    """Spans of random lengths with random gaps, at least one token, before each."""
    lengths = _composition(num_cut, num_spans, generator)
    gaps = _composition(num_tokens - num_cut, num_spans, generator)
    spans, at = [], 0
    for gap, length in zip(gaps, lengths, strict=True):
        spans.append((at + gap, at + gap + length))
        at += gap + length
    return spans


def _cut(
    tokens: Int[Tensor, " T"], spans: Sequence[Span], sentinel_ids: Sequence[int]
) -> tuple[Int[Tensor, " K"], Int[Tensor, " U"]]:
    """A sequence with a sentinel for each span, and the spans after their sentinels."""
    kept, cut, at = [], [], 0
    for sentinel, (begin, end) in zip(sentinel_ids, spans, strict=False):
        mark = torch.tensor([sentinel])
        kept += [tokens[at:begin], mark]
        cut += [mark, tokens[begin:end]]
        at = end
    kept.append(tokens[at:])
    return torch.cat(kept), torch.cat([*cut, torch.tensor([sentinel_ids[len(spans)]])])


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
