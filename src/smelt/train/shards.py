"""Token shards: text tokenised once, mapped into memory by every run that trains on it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smelt.checkpoint.source import read_tokenizer
from smelt.errors import RecipeError
from smelt.settings import expand_environment
from smelt.text import TokenBlocks, tokenize
from smelt.text.sources import TextSource
from smelt.train.cache import cache_folder, kept, key
from smelt.train.data import fit_tokenizer, wrap_tokenizer
from smelt.train.settings import TextSettings, TokenizerSettings
from smelt.train.stream import write_tokens

STREAMED_FROM = 1 << 24  # tokens; `tokenize` takes about 100 bytes of memory for each


@dataclass(frozen=True)
class Shard:
    """B sequences of T tokens in a file; the last sequence may end in padding."""

    rows: NDArray[np.uint16] | NDArray[np.uint32]  # [B, T], mapped
    num_tokens: int  # padding not counted
    num_bytes: int  # UTF-8 bytes of their text
    sha256: str  # as of the TokenBlocks it was made of; of a streamed one, of its tokens

    @property
    def num_full_rows(self) -> int:
        """The sequences without padding."""
        return self.num_tokens // int(self.rows.shape[1])

    def take(self, rows: Sequence[int]) -> Int[Tensor, "B T"]:
        """Those sequences, copied."""
        return torch.from_numpy(self.rows[list(rows)].astype(np.int64))

    def blocks(self) -> TokenBlocks:
        """All of it in memory."""
        ids = self.take(range(len(self.rows)))
        mask = (torch.arange(ids.numel()) < self.num_tokens).view_as(ids)
        return TokenBlocks(ids, mask, self.num_bytes, self.sha256)

    def counts(self, vocab_size: int) -> Int[Tensor, " V"]:
        """How often each token occurs."""
        flat = self.rows.reshape(-1)[: self.num_tokens]
        counts = np.zeros(vocab_size, np.int64)
        for at in range(0, len(flat), 1 << 24):  # bincount copies what it counts, eight bytes each
            counts += np.bincount(flat[at : at + (1 << 24)], minlength=vocab_size)
        return torch.from_numpy(counts)


def shard(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    settings: TextSettings,
    num_tokens: int,
) -> Shard:
    """The tokens that `smelt.text.tokenize` draws, from the cache if they were drawn before.

    More than 16 million are written as they are drawn (`smelt.train.stream`).
    """
    name = key(
        sources,
        tokenizer=tokenizer_sha256(tokenizer),
        num_tokens=num_tokens,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
    )
    make = partial(_make, sources, tokenizer, settings, num_tokens)
    folder = kept(cache_folder(settings.cache), f"tokens-{name}", make)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    rows = np.memmap(folder / "tokens.bin", meta["dtype"], "r", shape=tuple(meta["shape"]))
    return Shard(rows, meta["num_tokens"], meta["num_bytes"], meta["sha256"])


def _make(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    settings: TextSettings,
    num_tokens: int,
    folder: Path,
) -> None:
    meta: dict[str, Any] = {"text": [str(source) for source in sources]}
    if num_tokens > STREAMED_FROM:
        meta |= write_tokens(
            folder / "tokens.bin",
            sources,
            tokenizer,
            num_tokens=num_tokens,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
        )
    else:
        blocks = tokenize(
            sources,
            tokenizer,
            num_tokens=num_tokens,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
        )
        dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
        blocks.input_ids.numpy().astype(dtype).tofile(folder / "tokens.bin")
        meta |= {
            "shape": list(blocks.input_ids.shape),
            "dtype": dtype,
            "num_tokens": blocks.num_tokens,
            "num_bytes": blocks.num_bytes,
            "sha256": blocks.sha256,
        }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """The hash of what turns text into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spelt = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{tokenizer.eos_token}{tokenizer.pad_token}{spelt}".encode()).hexdigest()


def find_tokenizer(
    settings: TokenizerSettings, text: TextSettings | None, *, with_mask: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or one fitted to the train sources, once for each cache key.

    Args:
        text: what one is fitted to; not needed for that of a folder.
        with_mask: a fitted one gets a token `<|mask|>`; of a folder, it must have a mask token.
    """
    if settings.vocab_size is None:
        return _of_folder(settings.folder or "", with_mask)
    assert text is not None
    name = key(
        text.train, fitted=settings.vocab_size, mask=with_mask, **_fit_settings(settings, text)
    )

    def make(folder: Path) -> None:
        fitted = fit_tokenizer(
            text.train,
            vocab_size=settings.vocab_size or 0,
            num_sentinels=settings.sentinels,
            with_mask=with_mask,
            seed=text.seed,
        )
        fitted.save(str(folder / "tokenizer.json"))

    folder = kept(cache_folder(text.cache), f"tokenizer-{name}", make)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return wrap_tokenizer(backend, num_sentinels=settings.sentinels, with_mask=with_mask)


def _fit_settings(settings: TokenizerSettings, text: TextSettings) -> dict[str, int]:
    return {"sentinels": settings.sentinels, "seed": text.seed}


def _of_folder(named: str, with_mask: bool) -> PreTrainedTokenizerBase:
    folder = expand_environment(named)
    try:
        found: PreTrainedTokenizerBase = read_tokenizer(Path(folder))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"tokenizer.folder = {folder!r} holds no tokenizer ({reason}). Name a folder with "
            "tokenizer.json, or give tokenizer.vocab_size to fit one."
        ) from None
    if with_mask and found.mask_token_id is None:
        raise RecipeError(
            f"tokenizer.folder = {folder!r}: the tokenizer has no mask token, and objective is "
            "masked. Add one to it, or give tokenizer.vocab_size to fit one."
        )
    return found
