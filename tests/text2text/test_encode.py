"""Items as tokens: what is read and answered, what is cut, and that no answer is looked at."""

import re
from dataclasses import replace

import numpy as np
import pytest

from smelt.errors import RecipeError
from smelt.text2text.encode import Encoder
from smelt.text2text.items import Item

ITEM = Item(
    name="a",
    question="question: What is red?",
    cue="answer:",
    target="house",
    context="It is late. " * 10 + "The house is red. " + "Rain fell. " * 10,
    answer_at=124,
    references=("house",),
)


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, max_input=64, max_target=8)


def text(encoder, encoded):
    return encoder.tokenizer.decode(encoded.input_ids)


def one(encoder, item, *, for_training=False):
    (found,) = encoder.encode([item], for_training=for_training)
    return found


def test_the_answers_place_stands_between_question_and_context(encoder):
    found = one(encoder, replace(ITEM, context="The house is red.", answer_at=4))
    assert text(encoder, found) == (
        "question: What is red? answer:<extra_id_0> context: The house is red.<|endoftext|>"
    )
    assert encoder.tokenizer.decode(found.target_ids) == "<extra_id_0> house<|endoftext|>"
    assert not found.is_cut
    assert not found.is_target_cut


def test_a_tokenizer_without_sentinels_does_without(plain_tokenizer):
    encoder = Encoder(plain_tokenizer, max_input=256, max_target=16)
    found = one(encoder, replace(ITEM, context=""))
    assert text(encoder, found) == "question: What is red? answer:<|endoftext|>"
    assert encoder.mark == ()
    assert encoder.text(found.target_ids) == "house"


def test_a_target_comes_back(encoder):
    found = one(encoder, ITEM)
    assert encoder.text(found.target_ids[1:]) == "house"
    assert encoder.text([*found.target_ids, 50, 51]) == "house"  # nothing after its end


def test_nothing_is_longer_than_asked(tokenizer):
    long = replace(ITEM, question="question: " + "what " * 90, target="house " * 30)
    for length in (16, 40, 64):
        encoder = Encoder(tokenizer, max_input=length, max_target=8)
        for item in (ITEM, long, replace(long, context="")):
            for for_training in (True, False):
                found = one(encoder, item, for_training=for_training)
                assert len(found.input_ids) <= length
                assert len(found.target_ids) <= 8
                assert found.is_cut
                assert found.input_ids[-1] == found.target_ids[-1] == encoder.end
                assert encoder.mark[0] in found.input_ids  # the answer's place is never cut
    assert one(encoder, long).is_target_cut


def test_half_of_the_length_is_left_to_the_context(tokenizer):
    encoder = Encoder(tokenizer, max_input=60, max_target=8)
    found = one(encoder, replace(ITEM, question="question: " + "what " * 90))
    at = found.input_ids.index(encoder.mark[0])
    assert 25 < len(found.input_ids) - at < 35


def test_the_part_nearest_the_question_stays_wherever_it_is(encoder):
    """Of a context that is too long, whether it is trained on or not."""
    for at in range(0, 40, 3):
        words = ["Rain fell."] * 40
        words[at] = "The house is red."
        context = " ".join(words)
        item = replace(ITEM, context=context, answer_at=context.index("house"))
        for for_training in (True, False):
            found = one(encoder, item, for_training=for_training)
            assert "house is red" in text(encoder, found)
            assert found.is_cut
            assert len(found.input_ids) == 64  # the length is used


def test_for_training_the_answer_stays_far_from_the_question(encoder):
    for at in range(0, 40, 3):
        words = ["The house is red."] + ["Rain fell."] * 40
        words[at + 1] = "Snow it was."
        context = " ".join(words)
        item = replace(ITEM, target="Snow", context=context, answer_at=context.index("Snow"))
        assert "Snow" in text(encoder, one(encoder, item, for_training=True))
    assert "house is red" in text(encoder, one(encoder, item))


def test_where_nothing_of_the_question_is_said_the_middle_stays(encoder):
    context = " ".join(map(str, range(100, 200)))
    found = one(encoder, replace(ITEM, context=context, answer_at=None))
    kept = re.findall(r"1\d\d", text(encoder, found).partition("context:")[2])
    assert np.mean([int(number) for number in kept]) == pytest.approx(149.5, abs=2)


def test_for_reporting_nothing_of_the_answer_is_looked_at(encoder):
    found = one(encoder, ITEM)
    for other in (None, 3, 200):
        changed = replace(ITEM, answer_at=other, target="Rain", references=("Rain",))
        assert one(encoder, changed).input_ids == found.input_ids


def test_an_answer_that_is_near_the_question_moves_no_window(encoder):
    assert one(encoder, ITEM, for_training=True).input_ids == one(encoder, ITEM).input_ids


def test_choices_are_tokens_of_targets(encoder):
    item = replace(ITEM, choices=("no", "yes"), target="yes", label=1, context="")
    assert encoder.choices(item)[1] == one(encoder, item).target_ids


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    class Endless:
        eos_token_id = None
        is_fast = True

    with pytest.raises(RecipeError, match="cannot mark the end of an answer"):
        Encoder(Endless(), max_input=16, max_target=4)
