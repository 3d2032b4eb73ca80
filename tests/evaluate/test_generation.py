"""What a model writes: repetition and loops of constructed texts, KL along a model's own words."""

import numpy as np
import pytest
import torch

from asked import VOCABULARY, Bigram
from commands import make_source, text_file
from commands import smelt as run_smelt
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.evaluate.generation import Generating, _held_against, _write
from smelt.evaluate.repetition import distinct, figures, loop, repeated

# --- repetition ----------------------------------------------------------------------------------


def test_a_text_without_repetition_has_none():
    text = list(range(30))
    assert [repeated(text, n) for n in (2, 3, 4)] == [0, 0, 0]
    assert distinct([text], 2) == 1 and loop(text) is None


def test_one_token_over_and_over_repeats_all_but_the_first():
    text = [7] * 21
    assert repeated(text, 2) == pytest.approx(19 / 20)
    assert loop(text) == 1


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_a_loop_has_the_length_of_what_it_says_over_and_over(period):
    text = [*range(100, 132), *(i % period for i in range(32))]
    assert loop(text) == period
    text[-1] = 999
    assert loop(text) is None


def test_what_is_said_twice_is_no_loop_and_three_times_is_one():
    beginning = list(range(100, 124))
    assert loop([*beginning, *(list(range(12)) * 2)]) is None
    assert loop([*beginning, *(list(range(8)) * 3)]) == 8


def test_a_share_of_repeated_pairs_is_counted_by_hand():
    # ab bc ca ab bd: five pairs, of which one stood before
    assert repeated([1, 2, 3, 1, 2, 4], 2) == pytest.approx(1 / 5)
    assert repeated([1, 2], 3) is None


def test_texts_that_repeat_each_other_are_less_distinct_and_no_more_repetitive():
    apart = [list(range(i * 20, i * 20 + 20)) for i in range(4)]
    alike = [list(range(20))] * 4
    assert distinct(apart, 2) == 1 and distinct(alike, 2) == pytest.approx(1 / 4)
    one, other = (
        {x.metric: x.value for x in figures(texts, [False] * 4)} for texts in (apart, alike)
    )
    assert one["rep-2"] == other["rep-2"] == 0


def test_the_error_of_distinct_agrees_with_drawing_texts_anew():
    draws = np.random.default_rng(0)

    def texts():
        return [draws.integers(0, draws.integers(2, 40), 40).tolist() for _ in range(60)]

    values = [distinct(texts(), 2) for _ in range(200)]
    errors = [
        next(x for x in figures(texts(), [False] * 60) if x.metric == "distinct-2").standard_error
        for _ in range(20)
    ]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)


def test_a_text_that_ended_is_in_no_loop():
    texts = [[1] * 40, [1] * 40]
    found = {x.metric: x.value for x in figures(texts, [True, False])}
    assert found["loop rate"] == 0.5 and found["ended by itself"] == 0.5


# --- models --------------------------------------------------------------------------------------


def prefers(**words):
    return Bigram([float(words.get(word, 0)) for word in VOCABULARY])


def test_writing_is_greedy_or_drawn_from_the_seed(spelt):
    begin = torch.full((3, 4), VOCABULARY["it"])
    ids, lengths, ends = _write(prefers(good=5), spelt, begin, Generating(tokens=8))
    assert ids[:, 4:].eq(VOCABULARY["good"]).all() and lengths == [8] * 3 and not any(ends)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        how = Generating(tokens=8, temperature=1.0)
        drawn.append(_write(prefers(), spelt, begin, how)[0])
    assert torch.equal(drawn[0][:, :5], drawn[1][:, :5]) and not torch.equal(drawn[0], drawn[2])


def test_an_end_counts_as_written_and_what_follows_it_does_not(spelt):
    begin = torch.full((2, 4), VOCABULARY["it"])
    model = prefers(**{"<end>": 9})
    ids, lengths, ends = _write(model, spelt, begin, Generating(tokens=8))
    assert lengths == [1, 1] and all(ends)
    kl, _ = _held_against(model, prefers(), ids, lengths, 4)
    assert kl.count.tolist() == [1, 1]


def test_the_kl_along_a_models_own_words_is_that_of_its_predictions(spelt):
    model, original = prefers(good=2, bad=1), prefers(good=1)
    ids, lengths, _ = _write(model, spelt, torch.full((2, 4), 2), Generating(tokens=8))
    kl, agreement = _held_against(model, original, ids, lengths, 4)
    p, q = (one.logits.detach().double().log_softmax(-1) for one in (model, original))
    assert kl.mean == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
    assert agreement.mean == 1 and kl.count.tolist() == [8, 8]
    assert _held_against(model, model, ids, lengths, 4)[0].mean == pytest.approx(0, abs=1e-7)


def test_a_cached_generation_is_what_the_whole_forward_prefers(tmp_path):
    checkpoint = Checkpoint.open(make_source(tmp_path / "x"))
    model = load_model(checkpoint).eval()
    begin = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    ids, lengths, _ = _write(model, checkpoint.tokenizer, begin, Generating(tokens=10))
    with torch.no_grad():
        best = model(ids).logits.argmax(-1)
    for row, length in enumerate(lengths):
        assert torch.equal(best[row, 5 : 5 + length], ids[row, 6 : 6 + length])


# --- the command line ----------------------------------------------------------------------------


def test_evaluate_lets_checkpoints_write_and_records_it(tmp_path):
    a, b = (make_source(tmp_path / name / "x", seed=i) for i, name in enumerate("ab"))
    words = ("--generate", 16, "--prompts", 6, "--text", text_file(tmp_path), "--original", a)
    file = tmp_path / "r.json"
    said = run_smelt("evaluate", a, b, *words, "--tokens", 200, "-o", file, "--json",
                     "--set", "sequence_length=32")  # fmt: skip
    assert said.code == 0, said.err
    own = [one for one in said.json["results"] if one["task"] == "generation"]
    metrics = {one["metric"] for one in own if one["fingerprint"] == own[0]["fingerprint"]}
    assert metrics >= {"rep-2", "distinct-4", "loop rate", "ended by itself"}
    assert "KL to the original" not in metrics  # it is the original
    kl = next(one for one in own if one["metric"] == "KL to the original")
    assert kl["value"] > 0 and kl["standard_error"] > 0 and kl["unit"] == "tokens"
    assert kl["text"][-1] == "6 beginnings of 32 tokens, 16 tokens more, greedy"
    again = run_smelt("evaluate", a, b, *words, "--json", "--set", "sequence_length=32")
    assert [o["value"] for o in again.json["results"] if o["task"] == "generation"] == [
        o["value"] for o in own
    ]
    assert "the text itself" in run_smelt("evaluate", b, "--generate", 16, "--prompts", 4).out


def test_what_does_not_fit_a_model_is_refused(tmp_path):
    source = make_source(tmp_path / "x", max_position_embeddings=40)
    said = run_smelt("evaluate", source, "--generate", 16)
    assert said.code == 2 and "has 40 positions, and 32 tokens and 16 more" in said.err
    other = make_source(tmp_path / "y", vocab_size=301)
    said = run_smelt("evaluate", source, "--generate", 8, "--original", other)
    assert said.code == 2 and "cannot be held against" in said.err
