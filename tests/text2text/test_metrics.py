"""What answers are worth: slow references, named metrics, and the level of rules."""

import math
import random

import numpy as np
import pytest

from reference.benchmark_scores import (
    average_precision,
    binary_f1,
    expected_average_precision,
    squad_f1,
    words,
)
from smelt.text2text.baselines import nearest_window, trivial
from smelt.text2text.files import read_items
from smelt.text2text.items import Answer, Item
from smelt.text2text.metrics import RESAMPLES, measure
from smelt.text2text.tasks import TASKS
from smelt.text2text.words import exact_match, hotpot_f1, normalise, sentences, word_f1


def judged(labels, groups=None):
    return [
        Item(
            name=f"i{i}",
            question="question: q",
            cue="right:",
            target=("no", "yes")[label],
            choices=("no", "yes"),
            label=label,
            group=groups[i] if groups else "",
        )
        for i, label in enumerate(labels)
    ]


def says(choices):
    return [Answer((1.0 - choice, float(choice))) for choice in choices]


def by_name(measured):
    return {one.metric: one for one in measured}


# --- words ---------------------------------------------------------------------------------------

PAIRS = [
    ("The house.", "house", 1.0),
    ("a red house", "the house", 2 / 3),
    ("an  apple, an", "Apple", 1.0),
    ("red red house", "red house", 0.8),
    ("boat", "house", 0.0),
    ("", "house", 0.0),
    ("the", "a", 1.0),  # nothing is left of either
    ("the", "house", 0.0),
    ("U.S.", "us", 1.0),
]


@pytest.mark.parametrize(("answer", "reference", "value"), PAIRS)
def test_word_f1_is_that_of_squad(answer, reference, value):
    assert word_f1(answer, (reference,)) == pytest.approx(value)
    assert squad_f1(answer, reference) == pytest.approx(value)
    assert exact_match(answer, (reference,)) == float(normalise(answer) == normalise(reference))


def test_word_f1_is_that_of_the_slow_reference_on_random_words():
    draw = random.Random(0)
    vocabulary = ["a", "The", "house", "red", "boat.", "19", "-", "an"]
    for _ in range(300):
        answer, reference = (
            " ".join(draw.choices(vocabulary, k=draw.randint(0, 5))) for _ in range(2)
        )
        assert word_f1(answer, (reference,)) == pytest.approx(squad_f1(answer, reference))


def test_the_best_reference_counts():
    assert word_f1("red house", ("boat", "red house")) == 1.0
    assert exact_match("The boat", ("house", "boat")) == 1.0


def test_yes_and_no_share_no_words_in_hotpotqa():
    assert hotpot_f1("yes it is", ("yes",)) == 0.0
    assert word_f1("yes it is", ("yes",)) == 0.5
    assert hotpot_f1("Yes.", ("yes",)) == 1.0
    assert hotpot_f1("red house", ("the house",)) == pytest.approx(2 / 3)


# --- metrics -------------------------------------------------------------------------------------


def test_accuracy_is_a_mean_with_the_error_of_a_mean():
    items, answers = judged([0, 1, 1, 0]), says([0, 1, 0, 0])
    score = by_name(measure(TASKS["sst2"], items, answers))["accuracy"].score()
    assert (score.value, score.n, score.unit) == (0.75, 4, "items")
    assert score.standard_error == pytest.approx(np.std([1, 1, 0, 1], ddof=1) / 2)


def test_f1_is_that_of_the_slow_reference():
    draw = random.Random(1)
    for _ in range(20):
        labels, said = ([draw.randint(0, 1) for _ in range(12)] for _ in range(2))
        found = by_name(measure(TASKS["mrpc"], judged(labels), says(said)))["F1"]
        assert found.value == pytest.approx(binary_f1(said, labels))


def test_the_error_of_f1_is_the_spread_of_what_other_samples_would_give():
    """Of a thousand fresh samples, and of one resampled."""
    draw = np.random.default_rng(3)

    def sample():
        labels = draw.integers(0, 2, size=400)
        said = np.where(draw.random(400) < 0.8, labels, 1 - labels)
        return labels.tolist(), said.tolist()

    spread = np.std([binary_f1(said, labels) for labels, said in (sample() for _ in range(500))])
    labels, said = sample()
    error = by_name(measure(TASKS["mrpc"], judged(labels), says(said)))["F1"].score().standard_error
    assert error == pytest.approx(spread, rel=0.2)
    assert RESAMPLES >= 1000


def test_the_two_metrics_of_multirc_are_not_each_other():
    groups = ["a", "a", "a", "b", "b"]
    items, answers = judged([1, 0, 1, 0, 1], groups), says([1, 0, 1, 0, 0])
    found = by_name(measure(TASKS["multirc"], items, answers))
    assert found["F1 of answers"].value == pytest.approx(2 * 2 / (2 + 3))
    assert found["exact match of questions"].value == 0.5
    assert found["exact match of questions"].values == {"a": 1.0, "b": 0.0}
    assert found["accuracy"].value == 0.8
    assert found["F1 of answers"].unit == found["exact match of questions"].unit == "questions"


def test_map_and_mrr_are_those_of_the_slow_reference():
    draw = np.random.default_rng(0)
    for _ in range(30):
        labels = draw.integers(0, 2, size=18).tolist()
        scores = draw.random(18).tolist()
        groups = [f"q{i // 3}" for i in range(18)]
        items = judged(labels, groups)
        found = by_name(measure(TASKS["wikiqa"], items, [Answer((0.3, s)) for s in scores]))
        parts = [(scores[at : at + 3], labels[at : at + 3]) for at in range(0, 18, 3)]
        each = [average_precision(*part) for part in parts]
        kept = [value for value, (_, own) in zip(each, parts, strict=True) if any(own)]
        if not kept:
            continue
        assert found["MAP"].value == pytest.approx(np.mean(kept))
        assert found["MAP"].score().n == len(kept)
        assert found["MAP, all questions"].value == pytest.approx(np.mean(each))
        first = [
            1
            / (1 + sorted(s, reverse=True).index(max(x for x, y in zip(s, own, strict=True) if y)))
            for s, own in parts
            if any(own)
        ]
        assert found["MRR"].value == pytest.approx(np.mean(first))


def test_questions_without_an_answer_are_left_out_and_said():
    items = judged([0, 1, 0, 0], ["a", "a", "b", "b"])
    found = by_name(measure(TASKS["wikiqa"], items, says([1, 0, 0, 0])))
    assert found["MAP"].values == {"a": 0.5}
    assert found["MAP, all questions"].values == {"a": 0.5, "b": 0.0}
    assert found["MAP"].score().standard_error is None  # of one question


def test_a_ranking_has_more_to_it_than_being_over_a_half():
    """Candidates are ranked by how much likelier yes is, also where no is always likelier."""
    items = judged([0, 1], ["a", "a"])
    answers = [Answer((-0.1, -5.0)), Answer((-3.0, -6.0))]
    found = by_name(measure(TASKS["wikiqa"], items, answers))
    assert found["MAP"].value == 1.0
    assert found["accuracy"].value == 0.5


def test_answers_to_other_items_are_refused():
    with pytest.raises(ValueError, match="1 answers to 2 items"):
        measure(TASKS["sst2"], judged([0, 1]), says([1]))


# --- rules without a model -----------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_has_levels_without_a_model(task, files):
    train, items = (read_items(task, part, data=files).items for part in ("train", "report"))
    levels = trivial(TASKS[task], train, items)
    answers = [Answer(scores=(0.0,) * len(item.choices), text="x") for item in items]
    assert list(levels) == [one.metric for one in measure(TASKS[task], items, answers)]
    assert all(0 <= value <= 1 for rules in levels.values() for value in rules.values())


def test_the_majority_is_learnt_from_training():
    train, items = judged([1, 1, 0]), judged([0, 0, 0, 1])
    levels = trivial(TASKS["sst2"], train, items)
    assert levels == {"accuracy": {"majority of training": 0.25}}


def test_always_yes_is_the_level_of_f1():
    levels = trivial(TASKS["mrpc"], judged([0, 0, 1]), judged([1, 1, 0, 1]))
    assert levels["F1"]["always yes"] == pytest.approx(binary_f1([1] * 4, [1, 1, 0, 1]))
    assert levels["F1"]["majority of training"] == 0.0


def test_random_orders_reach_what_all_orders_reach_on_average():
    labels = [1, 0, 0, 0] * 100
    items = judged(labels, [f"q{i // 4}" for i in range(400)])
    level = trivial(TASKS["wikiqa"], items, items)["MAP"]["random order"]
    assert level == pytest.approx(expected_average_precision([1, 0, 0, 0]), abs=0.02)


def test_rules_for_rankings_are_what_they_are_called(files):
    train, items = (read_items("wikiqa", part, data=files).items for part in ("train", "report"))
    levels = trivial(TASKS["wikiqa"], train, items)["MAP"]
    assert levels["shared words"] == 1.0  # the right one names the thing
    assert levels["original order"] == 0.5  # it is the second of three
    assert levels["original order"] < levels["random order"] < levels["shared words"]


def test_rules_for_answers_do_not_know_the_answer(files):
    items = read_items("squad", "report", data=files).items
    item = items[0]
    assert sentences(item.context)[0] == "It is late."
    assert len(words(nearest_window(item))) == 4
    assert not words(nearest_window(item)) & {"painted", "red", "green", "blue"}
    levels = trivial(TASKS["squad"], read_items("squad", "train", data=files).items, items)
    assert 0 < levels["F1"]["sentence nearest the question"] < 1
    assert levels["F1"]["first sentence"] == 0.0
    assert not math.isnan(levels["EM"]["most frequent answer"])
