"""Text as blocks of tokens: what a model is calibrated, trained and evaluated on."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smelt.errors import CalibrationError
from smelt.text.pieces import Document, plain_text
from smelt.text.sources import (
    TextSource,
    draw_documents,
)


@dataclass(frozen=True)
class TokenBlocks:
    """B sequences of T tokens, cut from documents laid end to end."""

    input_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]  # True: a real token; False: padding after the last one
    num_bytes: int  # UTF-8 bytes of the text of the real tokens, exact
    sha256: str  # of ids and mask: binds statistics to the text they were made on

    @property
    def num_tokens(self) -> int:
        """The real tokens, padding not counted."""
        return int(self.mask.sum())

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """The sequences, `size` at a time, as a model takes them: ids and attention mask."""
        return [
            {"input_ids": ids, "attention_mask": mask.long()}
            for ids, mask in zip(self.input_ids.split(size), self.mask.split(size), strict=True)
        ]


def make_blocks(
    input_ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], num_bytes: int
) -> TokenBlocks:
    """Blocks of given tokens, with their hash."""
    digest = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
    digest.update(input_ids.to(torch.int64).contiguous().numpy().tobytes())
    digest.update(mask.contiguous().numpy().tobytes())
    return TokenBlocks(input_ids, mask, num_bytes, digest.hexdigest())


def tokenize(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_tokens: int,
    sequence_length: int,
    seed: int = 0,
    chat_template: bool = False,
) -> TokenBlocks:
    """So many tokens of the sources, drawn at random, mixed by weight, packed into sequences.

    Each source gives its weight's share of the tokens, from documents (of a long file: pieces of
    about 16 bytes per token of a sequence) drawn without replacement in an order that `seed` sets.
    The documents of all sources are shuffled together and laid end to end, each with the special
    tokens its tokenizer adds and an end-of-sequence token if there is one. The last sequence is
    padded. A source that holds too little gives what it has, with a warning.

    Args:
        num_tokens: tokens wanted of all sources together. A cut inside a character (byte-level
            tokenizers) moves to its start, so that there may be up to three tokens fewer.
        chat_template: render `messages`, and plain text as one user's turn, by the tokenizer's
            chat template.
    """
    if tokenizer is None:
        raise CalibrationError(
            "Text was given without a tokenizer. Put the tokenizer files beside the weights."
        )
    if not sources or num_tokens < 1 or sequence_length < 1:
        raise CalibrationError(
            f"{len(sources)} text sources, {num_tokens} tokens in sequences of {sequence_length}: "
            "at least one of each is needed."
        )
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "A chat template was asked for, and the tokenizer has none. Leave the option off."
        )
    generator = torch.Generator().manual_seed(seed)
    piece_bytes = min(max(16 * sequence_length, 4096), 65536)
    drawn: list[_Tokens] = []
    for source, quota in zip(sources, _quotas(sources, num_tokens), strict=True):
        documents = draw_documents(source, generator, piece_bytes)
        own = list(_fill(_encode(documents, tokenizer, chat_template), quota))
        found = sum(len(tokens.ids) for tokens in own)
        if quota and not found:
            raise CalibrationError(f"{source}: holds no text. Give a source with some in it.")
        if found < quota - 3:
            warnings.warn(
                f"{source}: {found:,} tokens found where {quota:,} were asked; going on with them.",
                stacklevel=2,
            )
        drawn += own
    order = torch.randperm(len(drawn), generator=generator).tolist()
    ids = torch.cat([torch.tensor(drawn[i].ids) for i in order])
    num_bytes = sum(tokens.num_bytes for tokens in drawn)
    return make_blocks(*_pack(ids, sequence_length, _padding(tokenizer)), num_bytes)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one document, and where in its text each of them ends."""

    ids: list[int]
    ends: list[int]  # characters of the text up to and with each token; never falls
    starts: list[int]  # where each token begins
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())

    def head(self, count: int) -> "_Tokens":
        """The first `count` tokens, or fewer where the cut would fall inside a character."""
        while self._is_inside(count):
            count -= 1
        while count == 0 or self._is_inside(count):  # the first character is longer than that
            count += 1
        text = self.text[: self.ends[count - 1]]
        return _Tokens(self.ids[:count], self.ends[:count], self.starts[:count], text)

    def _is_inside(self, count: int) -> bool:
        """Whether a cut after `count` tokens falls inside a character."""
        return 0 < count < len(self.ids) and self.starts[count] < self.ends[count - 1]


def _encode(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> Iterator[_Tokens]:
    """The documents in tokens, an end-of-sequence token after each; blank ones are left out."""
    if not tokenizer.is_fast:
        raise CalibrationError(
            f"{type(tokenizer).__name__} cannot say which text a token stands for. "
            "Save the tokenizer with a tokenizer.json (a fast tokenizer)."
        )
    while group := list(islice(documents, 16)):
        texts = [_text(document, tokenizer, chat_template) for document in group]
        texts = [text for text in texts if text.strip()]
        if not texts:
            continue
        encoded = tokenizer(
            texts,
            add_special_tokens=not chat_template,  # a rendered chat holds its own
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for text, ids, offsets in zip(
            texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            yield _located(text, list(ids), offsets, tokenizer.eos_token_id)


def _located(text: str, ids: list[int], offsets: list[tuple[int, int]], eos: int | None) -> _Tokens:
    starts, ends, reached = [], [], 0
    for start, end in offsets:
        starts.append(start if end > start else reached)  # a special token stands for no text
        reached = max(reached, end)
        ends.append(reached)
    if eos is not None and (not ids or ids[-1] != eos):
        ids, starts, ends = [*ids, eos], [*starts, len(text)], [*ends, len(text)]
    return _Tokens(ids, ends, starts, text)


def _text(document: Document, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> str:
    if not chat_template:
        return plain_text(document)
    turns = [{"role": "user", "content": document}] if isinstance(document, str) else document
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # whatever the template's own code raises
        raise CalibrationError(f"The chat template refuses a document: {error}") from None


def _fill(documents: Iterator[_Tokens], quota: int) -> Iterator[_Tokens]:
    """Documents until `quota` tokens are reached, the last one cut."""
    while quota > 0 and (tokens := next(documents, None)) is not None:
        if len(tokens.ids) > quota:
            yield tokens.head(quota)
            return
        quota -= len(tokens.ids)
        yield tokens


def _quotas(sources: Sequence[TextSource], num_tokens: int) -> list[int]:
    """Tokens of each source: proportional to the weights, adding up exactly."""
    total = sum(source.weight for source in sources)
    bounds, share = [0], 0.0
    for source in sources:
        share += source.weight / total
        bounds.append(round(num_tokens * share))
    bounds[-1] = num_tokens
    return [end - begin for begin, end in pairwise(bounds)]


def _pack(
    ids: Int[Tensor, " S"], sequence_length: int, padding: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """The stream in rows, the last one padded."""
    num_rows = -(-len(ids) // sequence_length)
    rows = torch.full((num_rows * sequence_length,), padding, dtype=torch.int64)
    rows[: len(ids)] = ids
    mask = torch.arange(len(rows)) < len(ids)
    return rows.view(num_rows, -1), mask.view(num_rows, -1)


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
