"""Spans that recur in a sequence: what teaches a model to copy an answer from its context."""

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 8  # tokens of a recurring span
NUM_COMMON = 128  # the most frequent tokens of a text: no span begins or ends with one of them

Span = tuple[int, int]  # begin and end, end not included


def recurring_clusters(
    tokens: Sequence[int], *, starts_word: Sequence[bool], common: Collection[int]
) -> list[list[Span]]:
    """Groups of spans that hold the same tokens, two or more each, no two of them overlapping.

    A span is whole words, at most eight tokens, and neither begins nor ends with a common token.
    Longer ones go first: a place inside a longer recurring span belongs to no other group.

    Args:
        tokens: the sequence.
        starts_word: of every token of the vocabulary, whether a word may begin with it.
        common: tokens that stand for nothing in particular.

    Source: recurring span selection, Ram et al. 2021, arXiv:2101.00438, §3. Differs in that the
    stop words are the text's most frequent tokens, and that longer spans are preferred.
    """
    begins = [starts_word[token] for token in tokens] + [True]
    may_bound = [token not in common for token in tokens]
    covered = [False] * len(tokens)
    found = []
    for length in range(min(MAX_LENGTH, len(tokens) // 2), 0, -1):
        groups: dict[tuple[int, ...], list[Span]] = defaultdict(list)
        for begin in range(len(tokens) - length + 1):
            end = begin + length
            if not (begins[begin] and begins[end] and may_bound[begin] and may_bound[end - 1]):
                continue
            if any(covered[begin:end]):
                continue
            group = groups[tuple(tokens[begin:end])]
            if not group or group[-1][1] <= begin:
                group.append((begin, end))
        for group in groups.values():
            free = [span for span in group if not any(covered[slice(*span)])]
            if len(free) > 1:
                found.append(free)
                for begin, end in free:
                    covered[begin:end] = [True] * length
    return found


def recurring_spans(
    clusters: Sequence[Sequence[Span]],
    *,
    max_tokens: int,
    max_spans: int,
    generator: torch.Generator,
) -> list[Span]:
    """One span of each of some groups, drawn at random, in order of place; the others stay.

    Args:
        clusters: `recurring_clusters`.
        max_tokens: tokens that may be cut out in all.
        max_spans: spans that may be cut out.
        generator: draws groups, and the span of each.
    """
    chosen: list[Span] = []
    for place in torch.randperm(len(clusters), generator=generator).tolist():
        group = clusters[place]
        begin, end = group[int(torch.randint(len(group), (1,), generator=generator))]
        if len(chosen) < max_spans and end - begin <= max_tokens:
            chosen.append((begin, end))
            max_tokens -= end - begin
    return sorted(chosen)


def common_tokens(counts: Int[Tensor, " V"]) -> frozenset[int]:
    """The 128 most frequent tokens of a text; of equally frequent ones the lower ids.

    Args:
        counts: how often each token occurs in it.
    """
    order = torch.argsort(counts, descending=True, stable=True)[:NUM_COMMON]
    return frozenset(order[counts[order] > 0].tolist())


def word_starts(tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Of every token, whether a word may begin with it: its text does not begin like a word's rest.

    The marks of byte-level BPE and sentencepiece for a space are no letters, and neither is
    punctuation.
    """
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [name[:1] in ("Ġ", "Ċ", "▁") or not name[:1].isalnum() for name in names]
