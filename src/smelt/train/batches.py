"""Batches out of token shards: what the model sees at each step, and in which order."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from smelt.text.spans import IGNORED, Corruption
from smelt.train.data import Example
from smelt.train.shards import Shard


class Rows(Protocol):
    """The training set: examples by number, a whole batch at a time.

    A number is epoch · len + example, so that what is random about an example (its masks) follows
    from the number alone.
    """

    @property
    def lengths(self) -> Sequence[int] | None:
        """Of the examples, where batches go by them."""

    def __len__(self) -> int: ...

    def __getitems__(self, numbers: Sequence[int]) -> Example: ...


class CausalRows:
    """Sequences as they are; the labels are the sequences, the shift is the loss's business."""

    lengths = None

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def __len__(self) -> int:
        return self.shard.num_full_rows

    def __getitems__(self, numbers: Sequence[int]) -> Example:
        return {"input_ids": self.shard.take([number % len(self) for number in numbers])}


class MaskedRows:
    """Sequences with some tokens hidden, other ones in each epoch."""

    lengths = None

    def __init__(self, shard: Shard, masking: "Masking", seed: int) -> None:
        self.shard, self.masking, self.seed = shard, masking, seed

    def __len__(self) -> int:
        return self.shard.num_full_rows

    def __getitems__(self, numbers: Sequence[int]) -> Example:
        places = [divmod(number, len(self)) for number in numbers]
        ids = self.shard.take([row for _, row in places])
        return self.masking.hide(ids, None, [(self.seed, row, epoch) for epoch, row in places])


class SpanRows:
    """Sequences with spans cut out, or questions about them.

    Args:
        shard: the text.
        corruption: how it is corrupted.
        seed: of what is drawn.
        redraw: other spans in each epoch; else a sequence is one example for good.
    """

    lengths = None

    def __init__(
        self, shard: Shard, corruption: Corruption, seed: int, *, redraw: bool = False
    ) -> None:
        self.shard, self.corruption = shard, corruption
        self.seed, self.redraw = seed, redraw

    def __len__(self) -> int:
        return self.shard.num_full_rows

    def __getitems__(self, numbers: Sequence[int]) -> Example:
        places = [divmod(number, len(self)) for number in numbers]
        ids = self.shard.take([row for _, row in places])
        pairs = []
        for tokens, (epoch, row) in zip(ids, places, strict=True):
            seed = (self.seed, row, epoch if self.redraw else 0)
            state = int(np.random.SeedSequence(seed).generate_state(1)[0])
            generator = torch.Generator().manual_seed(state)
            pairs.append(self.corruption.of_one(tokens, generator, seed))
        found = self.corruption.together(pairs)
        return {
            "input_ids": found.input_ids,
            "attention_mask": found.mask.long(),
            "decoder_input_ids": found.decoder_input_ids,
            "decoder_attention_mask": found.decoder_mask.long(),
            "labels": found.labels,
        }


class ExampleRows:
    """Examples that lie in memory, each a mapping of tensors of equal shapes."""

    lengths = None

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, numbers: Sequence[int]) -> Example:
        rows = [self.examples[number % len(self)] for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class PaddedRows:
    """Examples of unequal lengths in memory; a batch is as long as its longest.

    Args:
        examples: tensors of one axis, by the names of a model's arguments.
        padding: what fills up each of them.
        by: the argument by whose length batches are put together; None: as they come.
    """

    def __init__(
        self, examples: Sequence[Example], padding: Mapping[str, int], *, by: str | None = None
    ) -> None:
        self.examples, self.padding = examples, padding
        self.lengths = None if by is None else [len(one[by]) for one in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, numbers: Sequence[int]) -> Example:
        rows = [self.examples[number % len(self)] for number in numbers]
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [row[name] for row in rows], batch_first=True, padding_value=self.padding[name]
            )
            for name in rows[0]
        }


class Masking:
    """The corruption that a masked language model undoes.

    A share of a sequence's tokens is predicted: four fifths of these are hidden by the mask token,
    a tenth is replaced by a random token, a tenth stays.

    Source: BERT, arXiv:1810.04805, §3.1. Differs in that the number of predicted tokens of a
    sequence is fixed (the share, rounded, at least one), and that there is no next-sentence task.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float) -> None:
        special = sorted(set(tokenizer.all_special_ids))
        self.mask_id, self.share = int(tokenizer.mask_token_id), share
        self.special = np.array(special)
        self.ordinary = np.setdiff1d(np.arange(len(tokenizer)), self.special)

    def hide(
        self,
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"] | None,
        seeds: Sequence[tuple[int, ...]],
    ) -> Example:
        """The sequences corrupted, each by its own seed, with the hidden tokens as labels.

        Args:
            ids: the sequences.
            mask: False where there is padding.
            seeds: of each sequence.
        """
        inputs, labels = ids.numpy().copy(), np.full(ids.shape, IGNORED)
        may = ~np.isin(inputs, self.special)
        if mask is not None:
            may &= mask.numpy()
        for row, candidates, seed, out in zip(inputs, may, seeds, labels, strict=True):
            generator = np.random.default_rng(seed)
            places = np.flatnonzero(candidates)
            wanted = max(round(len(places) * self.share), 1)
            chosen = generator.permutation(places)[:wanted]
            out[chosen] = row[chosen]
            fate = generator.random(len(chosen))
            row[chosen[fate < 0.8]] = self.mask_id
            swapped = chosen[fate >= 0.9]
            row[swapped] = generator.choice(self.ordinary, len(swapped))
        example = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        return example if mask is None else {**example, "attention_mask": mask.long()}


POOL = 64
"""Batches whose examples are sorted by their lengths together."""


class Order(Sampler[list[int]]):
    """The micro-batches of a run, one process's part of them.

    The examples of every epoch, each epoch in an order of its own, stand in one endless row; step s
    takes the next `batch_size` of them, whatever the number of micro-batches and processes.

    With lengths, every 64 batches of that row are put together anew, of examples about equally
    long, and come in an order of their own: less padding, the same examples.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        steps: int,
        batch_size: int,
        parts: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.num_examples, self.steps, self.seed = num_examples, steps, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.batch_size, self.parts = batch_size, parts
        self.rank, self.num_processes = rank, num_processes

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        row = self._row() if self.lengths is None else self._by_length(self.lengths)
        size = self.batch_size // (self.parts * self.num_processes)
        for _ in range(self.steps):
            step = list(islice(row, self.batch_size))
            for part in range(self.parts):
                at = (part * self.num_processes + self.rank) * size
                yield step[at : at + size]

    def _by_length(self, lengths: NDArray[np.int64]) -> Iterator[int]:
        """The row, batches of about equal lengths in it; ties keep the order of the row."""
        row, number = self._row(), 0
        while True:
            pool = np.array(list(islice(row, POOL * self.batch_size)))
            pool = pool[np.argsort(lengths[pool % self.num_examples], kind="stable")]
            batches = pool.reshape(POOL, self.batch_size)
            order = np.random.default_rng((self.seed, number, 1)).permutation(POOL)
            yield from batches[order].flatten().tolist()
            number += 1

    def _row(self) -> Iterator[int]:
        epoch = 0
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_examples)
            for part in np.array_split(order, -(-self.num_examples // 65536)):
                yield from (part + epoch * self.num_examples).tolist()
            epoch += 1
