"""Answers as words: what SQuAD's and HotpotQA's scores count, and what a question is about."""

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_FUNCTION_WORDS = frozenset(
    "a an and are as at be been but by can could did do does for from had has have he her his how "
    "i if in into is it its many more most much not of on or she so than that the their them then "
    "there these they this those to was we were what when where which while who whom whose why "
    "will with would you your".split()
)


def normalise(answer: str) -> str:
    """Lower case, without punctuation, articles and spare blanks.

    Source: the official SQuAD v1.1 script; HotpotQA's normalises alike.
    """
    text = "".join(ch for ch in answer.lower() if ch not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, references: tuple[str, ...]) -> float:
    """1 where the answer is one of the references, after normalisation."""
    return float(any(normalise(answer) == normalise(one) for one in references))


def word_f1(answer: str, references: tuple[str, ...]) -> float:
    """The best F1 of the answer's words with those of a reference, repeated words counted."""
    return max(_f1(normalise(answer).split(), normalise(one).split()) for one in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:  # nothing left of one: equal or wrong
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def hotpot_f1(answer: str, references: tuple[str, ...]) -> float:
    """As `word_f1`, but yes, no and noanswer are right or wrong: no word of them is shared."""
    special = {"yes", "no", "noanswer"}
    normal, (reference,) = normalise(answer), tuple(map(normalise, references))
    if normal != reference and special & {normal, reference}:
        return 0.0
    return word_f1(answer, references)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def content_words(text: str) -> set[str]:
    """The words that say what a text is about."""
    return set(words(text)) - _FUNCTION_WORDS


def asked_words(question: str) -> set[str]:
    """The content words of an item's question, without the word that introduces it."""
    return content_words(question.removeprefix("question: "))


def sentences(text: str) -> list[str]:
    """A text's sentences, roughly: cut after a full stop before a capital letter."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", text)
