"""A line of a task's file as items: the words a model reads, and the ones it should answer."""

from collections.abc import Callable, Iterator
from typing import Any

from smelt.text2text.items import Item, Record
from smelt.text2text.words import content_words

NO_YES = ("no", "yes")


class BadRecordError(ValueError):
    """A record that is no question; the message says what is wrong with it."""


def _text(record: Record, field: str) -> str:
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise BadRecordError(f"{field} is {value!r}: a text that is not empty is needed")
    return " ".join(value.split())


def _label(record: Record, field: str, allowed: tuple[Any, ...]) -> int:
    """The place of a label among those allowed; true is not 1 here."""
    value = record[field]
    for place, one in enumerate(allowed):
        if value == one and type(value) is type(one):
            return place
    raise BadRecordError(f"{field} is {value!r}: the labels are {', '.join(map(repr, allowed))}")


def _list(record: Record, field: str) -> list[Any]:
    value = record[field]
    if not isinstance(value, list) or not value:
        raise BadRecordError(f"{field} is {value!r:.60}: a list that is not empty is needed")
    return value


def sst2(record: Record, place: str) -> Iterator[Item]:
    """Is a sentence of a film review negative or positive?"""
    label = _label(record, "label", (0, 1))
    choices = ("negative", "positive")
    yield Item(
        name=place,
        question=f"sentence: {_text(record, 'sentence')}",
        cue="sentiment:",
        target=choices[label],
        choices=choices,
        label=label,
    )


def mrpc(record: Record, place: str) -> Iterator[Item]:
    """Do two sentences say the same?"""
    label = _label(record, "label", (0, 1))
    first, second = _text(record, "sentence1"), _text(record, "sentence2")
    yield Item(
        name=place,
        question=f"sentence1: {first} sentence2: {second}",
        cue="same:",
        target=NO_YES[label],
        choices=NO_YES,
        label=label,
    )


def multirc(record: Record, place: str) -> Iterator[Item]:
    """Is a candidate a right answer to a question about a passage? Any number of them may be."""
    passage = record["passage"]
    if not isinstance(passage, dict) or {"text", "questions"} - set(passage):
        raise BadRecordError("passage needs the fields text and questions")
    context = _text(passage, "text")
    for number, asked in enumerate(_list(passage, "questions")):
        if not isinstance(asked, dict) or {"question", "answers"} - set(asked):
            raise BadRecordError(f"question {number} needs the fields question and answers")
        group = f"{place}-{number}"
        question = _text(asked, "question")
        for at, answer in enumerate(_list(asked, "answers")):
            if not isinstance(answer, dict) or {"text", "label"} - set(answer):
                raise BadRecordError(f"answer {at} of question {number} needs text and label")
            label = _label(answer, "label", (0, 1))
            # Three wrong candidates of the published files are empty.
            candidate = _text(answer, "text") if label else " ".join(str(answer["text"]).split())
            yield Item(
                name=f"{group}-{at}",
                question=f"question: {question} candidate: {candidate}",
                cue="right:",
                context=context,
                target=NO_YES[label],
                choices=NO_YES,
                label=label,
                group=group,
                source=place,
            )


def copa(record: Record, place: str) -> Iterator[Item]:
    """Which of two sentences is the cause, or the effect, of a premise?"""
    asked = ("cause", "effect")[_label(record, "question", ("cause", "effect"))]
    label = _label(record, "label", (0, 1))
    first, second = _text(record, "choice1"), _text(record, "choice2")
    choices = ("first", "second")
    yield Item(
        name=place,
        question=f"premise: {_text(record, 'premise')} first: {first} second: {second}",
        cue=f"{asked}:",
        target=choices[label],
        choices=choices,
        label=label,
    )


def winogrande(record: Record, place: str) -> Iterator[Item]:
    """Which of two names fills the gap of a sentence?"""
    label = _label(record, "answer", ("1", "2"))
    sentence = _text(record, "sentence")
    if sentence.count("_") != 1:
        raise BadRecordError(f"sentence has {sentence.count('_')} gaps (_): one is needed")
    choices = (_text(record, "option1"), _text(record, "option2"))
    yield Item(
        name=place,
        question=f"sentence: {sentence} options: {choices[0]}, {choices[1]}",
        cue="gap:",
        target=choices[label],
        choices=choices,
        label=label,
        source=_text(record, "qID").rpartition("-")[0],  # twins differ after the last hyphen
    )


def squad(record: Record, place: str) -> Iterator[Item]:
    """A span of a paragraph that answers a question."""
    answers = record["answers"]
    if not isinstance(answers, dict) or {"text", "answer_start"} - set(answers):
        raise BadRecordError("answers needs the fields text and answer_start")
    texts = [_text({"answer": one}, "answer") for one in _list(answers, "text")]
    raw = record["context"]
    context = _text(record, "context")
    begins = _list(answers, "answer_start")[0]
    if not isinstance(begins, int) or not raw[begins:].startswith(answers["text"][0]):
        raise BadRecordError(
            f"answer_start {begins!r}: the context does not say {texts[0]!r} there"
        )
    before = len(" ".join(f"{raw[:begins]}|".split())) - 1  # in the context as it is read
    yield Item(
        name=place,
        question=f"question: {_text(record, 'question')}",
        cue="answer:",
        context=context,
        answer_at=before,
        target=texts[0],
        references=tuple(dict.fromkeys(texts)),
        source=context,
    )


def hotpotqa(record: Record, place: str) -> Iterator[Item]:
    """An answer that needs two of ten paragraphs: a span of one, or yes or no.

    The paragraphs come in the order of how many of the question's words they hold, which needs no
    answer to be known: the ones that are asked about seldom fit when they come last.
    """
    question, answer = _text(record, "question"), _text(record, "answer")
    paragraphs = []
    for number, one in enumerate(_list(record, "context")):
        if not isinstance(one, dict) or {"title", "text"} - set(one):
            raise BadRecordError(f"paragraph {number} of context needs title and text")
        paragraphs.append(f"{one['title']}: {' '.join(str(one['text']).split())}")
    asked = content_words(question)
    paragraphs.sort(key=lambda text: -len(asked & content_words(text)))  # stable
    context = " ".join(paragraphs)
    at = -1 if answer in NO_YES else context.find(answer)
    yield Item(
        name=place,
        question=f"question: {question}",
        cue="answer:",
        context=context,
        answer_at=at if at >= 0 else None,
        target=answer,
        references=(answer,),
        source=place,
    )


def wikiqa(record: Record, place: str) -> Iterator[Item]:
    """Does a sentence of an article answer a question? The sentences of a question are ranked.

    `smelt.text2text.files` numbers the sentences of a question in the cue, as they stand in the
    article: the original order is known to all who rank them.
    """
    label = _label(record, "label", (0, 1))
    group = _text(record, "question_id")
    yield Item(
        name=place,
        question=f"question: {_text(record, 'question')}",
        cue="sentence:",
        context=_text(record, "answer"),
        target=NO_YES[label],
        choices=NO_YES,
        label=label,
        group=group,
        source=group,
    )


Reader = Callable[[Record, str], Iterator[Item]]
