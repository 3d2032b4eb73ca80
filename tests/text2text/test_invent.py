"""Laws of invented questions: what is asked, what answers it, and what is drawn."""

import numpy as np
import pytest

from smelt.text2text.invent import PASSAGE_CHARS, cut, invent, spans
from smelt.text2text.words import content_words, words

TEXT = (
    "The river Amber rises near the village of Stony Oak and flows 48 km to the sea. In 1871 the "
    "engineer Mary Hale built a stone bridge over its lower course, which 3,200 people cross every "
    "day. Boats carry clay from the old quarry to Port Ellis, where Hale and Sons fire bricks. "
    "Along the banks grow tall willows, and otters hunt there in the early morning.\n"
    "Too short a line.\n"
    "The town hall of Port Ellis was opened in 1902 after a great fire had burnt down the wooden "
    "market. Its tower holds two bells, the larger of which weighs 910 kilograms. The council "
    "meets under a painted ceiling by Anna Reyes on the first Monday of the month."
)


@pytest.fixture(scope="module")
def items():
    return invent([TEXT], 400, seed=1)


def test_an_answer_stands_in_its_context_where_it_is_said_to(items):
    assert len(items) == 400
    for item in items:
        assert item.answer_at is not None and item.references == (item.target,)
        assert item.context[item.answer_at :].startswith(item.target)
        assert item.context in (" ".join(line.split()) for line in TEXT.splitlines())


def test_a_question_is_made_of_the_words_around_its_answer(items):
    asking = set(words("when what year in how many much number who which where kind of"))
    verbs = set(words("is was did are"))
    for item in items:
        said = words(item.question.removeprefix("question: "))
        left = words(item.context)
        for word in words(item.target):
            left.remove(word)  # once: the answer itself
        assert set(said) - asking - verbs <= set(left)
        assert item.question.endswith("?") and len(content_words(item.question)) > 2


def test_the_question_word_fits_what_is_asked_for(items):
    years = [item.question for item in items if item.target in ("1871", "1902")]
    assert years and all("when" in one.lower() or "year" in one.lower() for one in years)
    counts = [item.question.lower() for item in items if item.target in ("48", "910", "3,200")]
    assert counts and all("how m" in one or "number" in one for one in counts)


def test_what_is_drawn_follows_from_the_seed(items):
    assert invent([TEXT], 400, seed=1) == items
    assert invent([TEXT], 400, seed=2) != items
    assert [one.name for one in items] == [f"invented:{i + 1}" for i in range(400)]


def test_every_sentence_is_asked_about_before_one_is_asked_about_again():
    first = invent([TEXT], 7, seed=3)  # of as many sentences
    assert len({_sentence(one) for one in first}) == 7
    again = invent([TEXT], 28, seed=3)
    assert [(one.question, one.target) for one in again[:7]] == [
        (one.question, one.target) for one in first
    ]
    counts = [_sentence(one) for one in again]
    assert all(counts.count(one) == 4 for one in counts)


def _sentence(item):
    return item.context, item.context[: item.answer_at].count(". ")


def test_a_text_without_answers_makes_no_question():
    assert invent(["it is so and so it was. " * 20], 5, seed=0) == []
    assert invent([], 5, seed=0) == invent(["Short."], 5, seed=0) == []


def test_passages_are_whole_sentences_of_one_paragraph():
    least, most = PASSAGE_CHARS
    line = " ".join(f"Sentence {i} of a long paragraph is here." for i in range(100))
    parts = list(cut(f"{line}\n{TEXT}"))
    assert all(least <= len(part) <= most for part in parts)
    long = [part for part in parts if part.startswith("Sentence")]
    assert len(long) > 3 and " ".join(long) == line[: len(" ".join(long))]
    assert "Too short a line." not in parts
    giant = "word " * 400 + "end."
    assert list(cut(giant)) == [giant]  # one sentence is not cut


def test_answers_are_numbers_names_and_nouns_but_never_the_first_word():
    sentence = "She paid 40 percent to Mary Hale of Stony Oak in 1871 for the old mill."
    drawn = [spans(sentence, np.random.default_rng(seed)) for seed in range(60)]
    found = {(sentence[one.begin : one.end], one.kind) for some in drawn for one in some}
    assert {("40", "number"), ("40 percent", "number"), ("1871", "year")} <= found
    assert ("Mary Hale of Stony Oak", "name") in found and ("old mill", "thing") in found
    assert not any(text.startswith("She") for text, _ in found)
    assert not any("the" in words(text) for text, _ in found)
