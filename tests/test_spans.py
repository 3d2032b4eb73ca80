"""Corrupted sequences: random spans, spans that recur, questions about the text."""

import numpy as np
import pytest
import torch

from smelt.errors import CalibrationError
from smelt.text import TokenBlocks
from smelt.text.cloze import MOST_TOKENS, cloze_questions
from smelt.text.recurring import common_tokens, recurring_clusters, recurring_spans
from smelt.text.spans import IGNORED, Corruption, Mixture, span_corruption
from smelt.train.batches import SpanRows
from smelt.train.shards import Shard

MARKS = tuple(range(90, 100))
WORDS = [token % 3 != 2 for token in range(100)]  # a third of the tokens goes on with a word
COMMON = frozenset(range(10))


def text(seed, length=120, vocabulary=60):
    return np.random.default_rng(seed).integers(0, vocabulary, length).tolist()


def restored(read, cut):
    """The sequence with every span back in the place of its sentinel."""
    spans, mark = {}, None
    for token in cut:
        if token in MARKS:
            mark = token
            spans[mark] = []
        else:
            spans[mark].append(token)
    assert not spans[mark]  # the last sentinel closes the row
    return [t for token in read for t in (spans[token] if token in MARKS else [token])], spans


def blocks(rows):
    ids = torch.tensor(rows)
    return TokenBlocks(ids, torch.ones_like(ids, dtype=torch.bool), 0, "")


def mixture(recurring, cloze):
    return Mixture(recurring=recurring, cloze=cloze, starts_word=WORDS, common=COMMON)


def corruption(recurring=0.0, cloze=0.0):
    own = mixture(recurring, cloze) if recurring or cloze else None
    return Corruption(MARKS, density=0.15, mean_span=3.0, mixture=own)


# --- recurring spans -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_spans_of_a_group_are_equal_whole_words_that_do_not_overlap(seed):
    tokens = text(seed, vocabulary=25)
    covered = []
    groups = recurring_clusters(tokens, starts_word=WORDS, common=COMMON)
    for group in groups:
        found = {tuple(tokens[begin:end]) for begin, end in group}
        assert len(group) > 1
        assert len(found) == 1
        for begin, end in group:
            assert WORDS[tokens[begin]]
            assert end == len(tokens) or WORDS[tokens[end]]
            assert tokens[begin] not in COMMON
            assert tokens[end - 1] not in COMMON
            covered += range(begin, end)
    assert groups
    assert len(set(covered)) == len(covered)


def test_the_longest_recurring_span_is_one():
    tokens = [30, 31, 33, 1, 40, 30, 31, 33, 3, 45]
    groups = recurring_clusters(tokens, starts_word=[True] * 100, common=COMMON)
    assert groups == [[(0, 3), (5, 8)]]


@pytest.mark.parametrize("seed", range(20))
def test_a_recurring_span_can_be_read_where_it_stays(seed):
    tokens = torch.tensor(text(seed, vocabulary=25))
    read, cut = corruption(recurring=1.0).of_one(
        tokens, torch.Generator().manual_seed(seed), (seed,)
    )
    whole, spans = restored(read.tolist(), cut.tolist())
    assert whole == tokens.tolist()
    text_left = " ".join(map(str, read.tolist()))
    assert all(" ".join(map(str, span)) in text_left for span in spans.values())
    assert sum(map(len, spans.values())) <= round(0.15 * len(tokens))


def test_one_span_of_a_group_is_cut_within_what_may_be():
    groups = [[(0, 2), (10, 12)], [(4, 5), (7, 8)], [(14, 19), (20, 25)]]
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        chosen = recurring_spans(groups, max_tokens=4, max_spans=2, generator=generator)
        assert chosen == sorted(chosen)
        assert sum(end - begin for begin, end in chosen) <= 4
        assert len({next(g for g in range(3) if span in groups[g]) for span in chosen}) == len(
            chosen
        )
        assert not {(14, 19), (20, 25)} & set(chosen)


def test_text_without_recurring_spans_is_cut_as_ever():
    tokens = torch.arange(60)  # nothing twice
    read, cut = corruption(recurring=1.0).of_one(tokens, torch.Generator().manual_seed(0), (0,))
    whole, spans = restored(read.tolist(), cut.tolist())
    assert whole == tokens.tolist()
    assert sum(map(len, spans.values())) == 9


def test_common_tokens_are_the_most_frequent_and_never_absent_ones():
    counts = torch.zeros(300, dtype=torch.int64)
    counts[5], counts[200] = 3, 7
    assert common_tokens(counts) == {5, 200}
    assert common_tokens(torch.ones(300, dtype=torch.int64)) == set(range(128))


# --- cloze questions -----------------------------------------------------------------------------


def ask(seed, number=3, length=200):
    tokens = text(seed, length)
    found = cloze_questions(
        tokens,
        sentinel_ids=MARKS,
        starts_word=WORDS,
        common=COMMON,
        num_questions=number,
        seed=(seed,),
    )
    return tokens, found


@pytest.mark.parametrize("seed", range(20))
def test_a_question_is_answered_by_the_text_after_it(seed):
    tokens, found = ask(seed)
    _, spans = restored([], found.labels)
    context = tokens[: len(tokens) - 3 * MOST_TOKENS]
    assert found.input_ids[-len(context) :] == context
    asked = found.input_ids[: -len(context)]
    assert len(found.input_ids) <= len(tokens)
    assert [token for token in asked if token in MARKS] == list(MARKS[: len(spans) - 1])
    for mark, answer in list(spans.items())[:-1]:
        assert answer
        places = range(len(context))
        assert any(context[at : at + len(answer)] == answer for at in places), (mark, answer)
        assert answer[0] not in COMMON
        assert answer[-1] not in COMMON


def test_a_question_holds_words_around_its_answer_in_their_order():
    tokens, found = ask(1, number=1)
    (answer, _) = restored([], found.labels)[1].values()
    asked = [t for t in found.input_ids[: -(len(tokens) - MOST_TOKENS)] if t not in MARKS]
    near = [
        tokens[max(0, at - 24) : at] + tokens[at + len(answer) : at + len(answer) + 24]
        for at in range(len(tokens))
        if tokens[at : at + len(answer)] == answer
    ]

    def is_within(words, around):
        rest = iter(around)
        return all(word in rest for word in words)

    assert len(asked) >= 3
    assert any(is_within(asked, around) for around in near)


def test_questions_follow_from_their_seed():
    assert ask(3)[1] == ask(3)[1]
    first, second = (
        cloze_questions(
            text(0),
            sentinel_ids=MARKS,
            starts_word=WORDS,
            common=COMMON,
            num_questions=1,
            seed=(seed,),
        )
        for seed in (1, 2)
    )
    assert first != second


def test_a_text_too_short_is_not_asked_about():
    assert ask(0, length=40)[1] is None
    tokens = torch.tensor(text(0, 40))
    read, cut = corruption(cloze=1.0).of_one(tokens, torch.Generator().manual_seed(0), (0,))
    assert restored(read.tolist(), cut.tolist())[0] == tokens.tolist()


# --- a mixture -----------------------------------------------------------------------------------


def test_without_a_mixture_nothing_changed():
    """Rows of random spans, as they were before there was any other kind."""
    rows = blocks([text(i) for i in range(4)])
    found = span_corruption(rows, sentinel_ids=MARKS, seed=5)
    assert torch.equal(found.labels, corruption().of_blocks(rows, 5).labels)
    for read, mask, cut, row in zip(
        found.input_ids, found.mask, found.labels, rows.input_ids, strict=True
    ):
        assert restored(read[mask].tolist(), cut[cut != IGNORED].tolist())[0] == row.tolist()


def test_shares_are_those_asked_for():
    rows = blocks([text(i, vocabulary=40) for i in range(300)])
    found = corruption(recurring=0.3, cloze=0.5).of_blocks(rows, 0)
    kinds = []
    for read, mask, row in zip(found.input_ids, found.mask, rows.input_ids, strict=True):
        is_question = read[mask].tolist()[-20:] == row.tolist()[20:40]  # the text is the end
        kinds.append(is_question)
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.1)


def test_one_sentinel_is_too_few():
    with pytest.raises(CalibrationError, match="at least 2 sentinels"):
        Corruption((1,), density=0.15, mean_span=3.0)


# --- rows of a training set ----------------------------------------------------------------------


@pytest.fixture
def shard():
    rows = np.array([text(i) for i in range(6)], np.uint16)
    return Shard(rows, rows.size, 0, "")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_sequence_is_one_example_unless_it_is_drawn_again(shard):
    kept = SpanRows(shard, corruption(cloze=0.5), 0)
    drawn = SpanRows(shard, corruption(cloze=0.5), 0, redraw=True)
    assert same(kept.__getitems__([1, 4]), kept.__getitems__([7, 10]))  # an epoch later
    assert same(kept.__getitems__([1, 4]), drawn.__getitems__([1, 4]))
    assert not same(drawn.__getitems__([1, 4]), drawn.__getitems__([13, 16]))
    assert same(drawn.__getitems__([7]), drawn.__getitems__([7]))


def test_an_example_does_not_depend_on_its_batch(shard):
    rows = SpanRows(shard, corruption(recurring=0.5), 3)
    alone, beside = rows.__getitems__([2]), rows.__getitems__([2, 5])
    length = alone["labels"].shape[1]
    assert torch.equal(alone["labels"][0], beside["labels"][0, :length])
    assert (beside["labels"][0, length:] == IGNORED).all()
