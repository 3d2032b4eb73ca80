"""Cloze questions about a text that answers them: what teaches a model to find and copy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

ANSWER_WORDS = 3  # at most, of a short answer
LONG_WORDS = 16  # of a long one
LONG_SHARE = 0.5  # of the answers
SIDE_WORDS = 6  # of a question, before and after its gap, at most
LEAST_WORDS = 3  # that a question has
MOST_TOKENS = 20  # of a question
MOST_NOISE = 0.5  # share of a question's words that is left out, at most


@dataclass(frozen=True)
class Cloze:
    """Questions before the text they are about, and their answers."""

    input_ids: list[int]
    labels: list[int]  # sentinel, answer, sentinel, answer, …, last sentinel


def cloze_questions(
    tokens: Sequence[int],
    *,
    sentinel_ids: Sequence[int],
    starts_word: Sequence[bool],
    common: Collection[int],
    num_questions: int,
    seed: Sequence[int],
) -> Cloze | None:
    """A sequence with questions before it: words of it with a gap, which its own words fill.

    A question is up to six words on either side of an answer of one to three words, or, as often,
    of up to sixteen (which teach to copy: there is more to predict in them); the answer begins and
    ends with tokens that are not common. Some words of the question are left out (none
    to half of them, drawn for each question), and the sentinel stands in the gap or, as where a
    question is asked in earnest, after all of it. The text is shortened at its end by what the
    questions add, so that the sequence grows no longer. None: the text is too short or has no
    such words.

    Args:
        tokens: the text.
        sentinel_ids: the tokens that stand for answer 0, 1, …
        starts_word: of every token of the vocabulary, whether a word may begin with it.
        common: tokens that stand for nothing in particular.
        num_questions: how many are asked, at most.
        seed: of what is drawn.

    Source: noisy clozes, Lewis et al. 2019, arXiv:1906.04980, §2.3. Differs in that answers are any
    rare words, that words are left out but not moved, and that several questions share a text.
    """
    generator = np.random.default_rng(list(seed))
    text = tokens[: max(0, len(tokens) - num_questions * MOST_TOKENS)]
    bounds = [place for place, token in enumerate(text) if starts_word[token]]
    if len(bounds) < 2 * SIDE_WORDS:
        return None
    # The last word may have been cut: it is no answer and in no question.
    words = [list(text[begin:end]) for begin, end in pairwise(bounds)]
    may_begin = [word[0] not in common for word in words]
    may_end = [word[-1] not in common for word in words]
    taken = [False] * len(words)
    asked: list[int] = []
    answers: list[int] = []
    number = 0
    for begin in generator.permutation(len(words)).tolist():
        most = LONG_WORDS if generator.random() < LONG_SHARE else ANSWER_WORDS
        end = begin + int(generator.integers(1, most + 1))
        if number == min(num_questions, len(sentinel_ids) - 1):
            break
        if end > len(words) or not may_begin[begin] or not may_end[end - 1]:
            continue
        if any(taken[begin:end]):
            continue
        question = _question(words, begin, end, sentinel_ids[number], generator)
        if question is None:
            continue
        taken[begin:end] = [True] * (end - begin)
        asked += question
        answers += [sentinel_ids[number], *(token for word in words[begin:end] for token in word)]
        number += 1
    if not number:
        return None
    return Cloze([*asked, *text], [*answers, sentinel_ids[number]])


def _question(
    words: Sequence[list[int]],
    begin: int,
    end: int,
    sentinel: int,
    generator: np.random.Generator,
) -> list[int] | None:
    """The words around an answer, some left out, with the sentinel in the gap or at the end."""
    noise = generator.uniform(0, MOST_NOISE)
    before, after = generator.integers(0, SIDE_WORDS + 1, size=2).tolist()
    sides = words[max(0, begin - before) : begin], words[end : end + after]
    left, right = ([w for w in side if generator.random() >= noise] for side in sides)
    if len(left) + len(right) < LEAST_WORDS:
        return None
    at_end = generator.random() < 0.5
    ahead, behind = (token for word in left for token in word), (t for word in right for t in word)
    question = [*ahead, *behind, sentinel] if at_end else [*ahead, sentinel, *behind]
    return question if len(question) <= MOST_TOKENS else None
