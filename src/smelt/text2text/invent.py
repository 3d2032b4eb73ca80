"""Questions made from plain text: what teaches a small model to find an answer and to copy it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smelt.text2text.items import Item
from smelt.text2text.words import content_words, sentences

Kind = Literal["year", "number", "name", "thing"]

PASSAGE_CHARS = (200, 1000)  # a shorter paragraph is left out, a longer one cut between sentences
QUESTION_WORDS = 14  # of the sentence, at most
LEAST_CONTENT = 2  # of them that say what is asked
MOST_NOISE = 0.6  # share of words that is left out, at most; of far ones twice that of near ones
FAR_WORDS = 10  # from the answer: no word is farther
SHUFFLES = (0, 1, 3, 6)  # places that a word may move
WORD_LAST = 0.15  # of the questions: the question word at their end
ASKED_BY: dict[Kind, tuple[str, ...]] = {
    "year": ("When", "When", "What year", "In what year"),
    "number": ("How many", "How much", "What number"),
    "name": ("Who", "Who", "What", "What", "Which", "Where"),
    "thing": ("What", "What", "What kind of", "Which", "How"),
}
VERBS = ("", "", "is", "was", "did", "are")

_NUMBER = re.compile(r"\d[\d,.]*\d|\d")
_UNIT = re.compile(r" (?:million|billion|percent|per cent|years|km|miles|days|%)")
_YEAR = re.compile(r"1\d{3}|20\d\d")
_NAME = re.compile(r"[A-Z][\w'’-]+(?:(?: of| the| de| and)* [A-Z][\w'’-]+)*")
_WORD = re.compile(r"[A-Za-z][\w'’-]*")


@dataclass(frozen=True)
class Span:
    """A possible answer in a sentence, in characters."""

    begin: int
    end: int
    kind: Kind


def invent(texts: Sequence[str], number: int, *, seed: int) -> list[Item]:
    """Questions about passages of the texts, in SQuAD's form.

    The answer is a span of a sentence: a number, a name, or up to three words after an article or
    the like. The question is what else the sentence says, some of it left out and moved, behind a
    question word that asks for such an answer. Sentences are asked about in a random order, each
    once before any a second time; those that make no question are passed over.

    Args:
        texts: of any length; paragraphs are divided by line breaks.
        number: how many questions, at most: texts without any give none.
        seed: of all that is drawn.

    Source: noisy clozes of Lewis et al. 2019, arXiv:1906.04980, §2.3. Differs in that answers and
    sentences are found by their letters, not by a parser, and that a question never is a statement
    with a gap.
    """
    draw = np.random.default_rng(seed)
    passages = list(dict.fromkeys(one for text in texts for one in cut(text)))
    places = [
        (passage, begin, begin + len(sentence))
        for passage in passages
        for begin, sentence in _placed(passage)
    ]
    items: list[Item] = []
    while len(items) < number:
        before = len(items)
        for place in draw.permutation(len(places)).tolist():
            item = _asked(*places[place], name=f"invented:{len(items) + 1}", draw=draw)
            items += [item] if item is not None else []
            if len(items) == number:
                break
        if len(items) == before:
            break
    return items


def cut(text: str) -> Iterator[str]:
    """The passages of a text: its paragraphs, long ones in parts of whole sentences."""
    least, most = PASSAGE_CHARS
    for line in text.splitlines():
        passage = ""
        for sentence in sentences(" ".join(line.split())):
            if passage and len(passage) + 1 + len(sentence) > most:
                if len(passage) >= least:
                    yield passage
                passage = ""
            passage = f"{passage} {sentence}" if passage else sentence
        if len(passage) >= least:
            yield passage


def _placed(passage: str) -> Iterator[tuple[int, str]]:
    """The sentences of a passage, and where they begin."""
    begin = 0
    for sentence in sentences(passage):
        yield begin, sentence
        begin += len(sentence) + 1


def _asked(
    passage: str, begin: int, end: int, *, name: str, draw: np.random.Generator
) -> Item | None:
    """A question about one sentence of a passage; None: it has no answer, or nothing to ask by."""
    sentence = passage[begin:end]
    found = spans(sentence, draw)
    if not found:
        return None
    answer = found[draw.integers(len(found))]
    question = _question(sentence, answer, draw)
    if question is None:
        return None
    target = sentence[answer.begin : answer.end]
    return Item(
        name=name,
        question=f"question: {question}",
        cue="answer:",
        context=passage,
        answer_at=begin + answer.begin,
        target=target,
        references=(target,),
        source=passage,
    )


# --- answers -------------------------------------------------------------------------------------


def spans(sentence: str, draw: np.random.Generator) -> list[Span]:
    """The possible answers in a sentence: all numbers and names, and half as many things."""
    found = [*_numbers(sentence, draw), *_names(sentence)]
    things = list(_things(sentence, draw))
    kept = draw.permutation(len(things))[: max(1, len(found) // 2)]
    return found + [things[place] for place in kept.tolist()]


def _numbers(sentence: str, draw: np.random.Generator) -> Iterator[Span]:
    """Runs of digits; a unit behind them belongs to every other answer."""
    for match in _NUMBER.finditer(sentence):
        end = match.end()
        unit = _UNIT.match(sentence, end)
        if unit is not None and draw.random() < 0.5:
            end = unit.end()
        yield Span(match.start(), end, "year" if _YEAR.fullmatch(match.group()) else "number")


def _names(sentence: str) -> Iterator[Span]:
    """Runs of words with a capital letter; the first of a sentence has one anyway."""
    for match in _NAME.finditer(sentence):
        if match.start() > 0 and content_words(match.group()):
            yield Span(match.start(), match.end(), "name")


def _things(sentence: str, draw: np.random.Generator) -> Iterator[Span]:
    """One to three content words, only blanks between them, behind a word that is none."""
    words = list(_WORD.finditer(sentence))
    for place in range(1, len(words)):
        if content_words(words[place - 1].group()):
            continue
        run = words[place : place + int(draw.choice((1, 1, 2, 2, 3)))]
        begin, end = run[0].start(), run[-1].end()
        is_run = " ".join(word.group() for word in run) == sentence[begin:end]
        if is_run and all(content_words(word.group()) for word in run):
            yield Span(begin, end, "thing")


# --- questions -----------------------------------------------------------------------------------


def _question(sentence: str, answer: Span, draw: np.random.Generator) -> str | None:
    """What a sentence says beside the answer, thinned and moved; None: too little is left."""
    left, right = sentence[: answer.begin].split(), sentence[answer.end :].split()
    at = len(left)
    noise = draw.uniform(0, MOST_NOISE)
    kept = [
        (place, word)
        for place, word in enumerate(left + right)
        if draw.random() > noise * 0.6 * (1 + min(abs(place - at), FAR_WORDS) / FAR_WORDS)
    ]
    if len(kept) > QUESTION_WORDS:
        first = int(draw.integers(len(kept) - QUESTION_WORDS + 1))
        kept = kept[first : first + QUESTION_WORDS]
    if sum(bool(content_words(word)) for _, word in kept) < LEAST_CONTENT:
        return None
    most = int(draw.choice(SHUFFLES))
    moved = sorted(kept, key=lambda one: one[0] + draw.uniform(-most, most))
    said = " ".join(word for _, word in moved).strip(" .,;:")
    asked = ASKED_BY[answer.kind]
    word = asked[draw.integers(len(asked))]
    if draw.random() < WORD_LAST:
        return f"{said} {word.lower()}?"
    return " ".join(filter(None, (word, VERBS[draw.integers(len(VERBS))], said))) + "?"
