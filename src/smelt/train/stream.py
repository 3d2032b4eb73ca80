"""Tokens of much text, written as they come: memory holds a window of them, not all."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from smelt.errors import CalibrationError
from smelt.text.pieces import plain_text
from smelt.text.sources import TextSource, draw_documents

WINDOW_TOKENS = 1 << 24  # within which documents of all sources are shuffled together

Tokens = NDArray[np.unsignedinteger[Any]]


def write_tokens(
    path: Path,
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    sequence_length: int,
    seed: int,
    window: int = WINDOW_TOKENS,
) -> dict[str, Any]:
    """Write so many tokens of the sources, mixed by weight, as rows; returns what is written.

    As `smelt.text.tokenize`, with two differences: documents of all sources are shuffled within
    windows (each source's own are drawn in random order before), and a cut at the end may fall
    inside a character.

    Args:
        path: the file to make; 16-bit tokens where the vocabulary allows, else 32-bit ones.
        sources: the text.
        tokenizer: any.
        num_tokens: of all sources together.
        sequence_length: T; the last row is padded with zeros.
        seed: of the order.
        window: tokens that are shuffled together.

    Raises:
        CalibrationError: a source that cannot be read or holds no text.
    """
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    digest = hashlib.sha256(f"{num_tokens} {sequence_length} {dtype}".encode())
    written = num_bytes = 0
    with path.open("wb") as file:
        for ids, size in _windows(sources, tokenizer, num_tokens, sequence_length, seed, window):
            values = ids[: num_tokens - written].astype(dtype)
            file.write(values.tobytes())
            digest.update(values.tobytes())
            written, num_bytes = written + len(values), num_bytes + size
        padding = np.zeros(-written % sequence_length, dtype)
        file.write(padding.tobytes())
    return {
        "shape": [(written + len(padding)) // sequence_length, sequence_length],
        "dtype": str(dtype),
        "num_tokens": written,
        "num_bytes": num_bytes,
        "sha256": digest.hexdigest(),
    }


def _windows(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    sequence_length: int,
    seed: int,
    window: int,
) -> Iterator[tuple[Tokens, int]]:
    """The tokens of one window after another, and the bytes of their text."""
    piece_bytes = min(max(16 * sequence_length, 4096), 65536)
    drawn = []
    for place, source in enumerate(sources):
        generator = torch.Generator().manual_seed(seed + place)
        drawn.append(_documents(draw_documents(source, generator, piece_bytes), tokenizer))
    order = np.random.default_rng((seed, len(sources)))
    shares = np.array([source.weight for source in sources])
    shares = shares / shares.sum()
    given = np.zeros(len(sources))  # tokens of each source so far
    for begin in range(0, num_tokens, window):
        goal = min(begin + window, num_tokens)
        documents: list[tuple[Tokens, int]] = []
        for place, source in enumerate(sources):
            while given[place] < shares[place] * goal:
                document = next(drawn[place], None)
                if document is None:
                    _ends_early(source, int(given[place]), int(shares[place] * num_tokens))
                    shares[place] = 0.0  # the others give no more than they were to
                    break
                documents.append(document)
                given[place] += len(document[0])
        if documents:
            shuffled = [documents[place] for place in order.permutation(len(documents))]
            yield np.concatenate([ids for ids, _ in shuffled]), sum(size for _, size in shuffled)


def _documents(
    documents: Iterator[Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Tokens, int]]:
    """The tokens of each document, with an end-of-sequence token, and the bytes of its text."""
    eos = tokenizer.eos_token_id
    while group := list(islice(documents, 64)):
        texts = [text for text in map(plain_text, group) if text.strip()]
        if not texts:
            continue
        encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        for text, ids in zip(texts, encoded, strict=True):
            ended = ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
            yield np.array(ended, np.uint32), len(text.encode())


def _ends_early(source: TextSource, found: int, asked: int) -> None:
    if not found:
        raise CalibrationError(f"{source}: holds no text. Give a source with some in it.")
    warnings.warn(
        f"{source}: {found:,} tokens found where {asked:,} were asked; going on with them.",
        stacklevel=2,
    )
