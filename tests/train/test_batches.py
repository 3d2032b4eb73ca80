"""Laws of batches: the order of examples, and the corruption of masked language models."""

from itertools import chain, pairwise

import pytest
import torch

from smelt.text import parse_source
from smelt.train.batches import POOL, Masking, Order
from smelt.train.data import train_tokenizer


def order(**changes):
    settings = {"steps": 7, "batch_size": 4, "parts": 1, "seed": 0, **changes}
    return list(Order(10, **settings))


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
    numbers = [number for batch in order() for number in batch]
    first, second = numbers[:10], numbers[10:20]
    assert sorted(first) == list(range(10))
    assert sorted(second) == list(range(10, 20))  # the epoch is in the number
    assert [number - 10 for number in second] != first


def test_the_order_follows_from_the_seed():
    assert order() == order()
    assert order() != order(seed=1)


@pytest.mark.parametrize(("parts", "num_processes"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_micro_batches_and_processes_share_out_the_same_steps(parts, num_processes):
    shares = [
        order(parts=parts, rank=rank, num_processes=num_processes) for rank in range(num_processes)
    ]
    for step, whole in enumerate(order()):
        micro = slice(step * parts, (step + 1) * parts)
        together = [number for share in shares for batch in share[micro] for number in batch]
        assert sorted(together) == sorted(whole)
        assert len({len(batch) for share in shares for batch in share[micro]}) == 1


LENGTHS = [5, 60, 7, 58, 6, 59, 8, 61, 9, 57]


def test_batches_by_length_hold_the_examples_of_the_plain_order():
    settings = {"steps": 2 * POOL}
    plain, grouped = order(**settings), order(**settings, lengths=LENGTHS)
    assert plain != grouped == order(**settings, lengths=LENGTHS)
    for begin in (0, POOL):
        pools = [sorted(chain(*one[begin : begin + POOL])) for one in (plain, grouped)]
        assert pools[0] == pools[1]


def test_batches_by_length_are_of_about_one_length_in_no_order_of_lengths():
    grouped = order(steps=POOL, lengths=LENGTHS)
    spread = [[LENGTHS[number % 10] for number in batch] for batch in grouped]
    assert sum(max(one) - min(one) > 4 for one in spread) <= 1  # the batch between short and long
    assert 20 < sum(max(a) < max(b) for a, b in pairwise(spread)) < POOL - 20


def test_micro_batches_of_batches_by_length_share_out_the_same_steps():
    halves = order(steps=9, parts=2, lengths=LENGTHS)
    whole = order(steps=9, lengths=LENGTHS)
    assert [halves[2 * i] + halves[2 * i + 1] for i in range(9)] == whole


# --- masks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer([parse_source(str(text / "train.txt"))], vocab_size=300, with_mask=True)


@pytest.fixture
def hidden(tokenizer):
    """A sequence of 4000 tokens with every 40th the end of a text, and what Masking made of it."""
    ids = torch.arange(4000).remainder(200).add(60)[None]
    ids[:, ::40] = tokenizer.eos_token_id
    return ids, Masking(tokenizer, 0.15).hide(ids, None, [(0, 0, 0)])


def test_a_masked_model_predicts_the_share_of_tokens_and_sees_the_others(hidden, tokenizer):
    ids, example = hidden
    chosen = example["labels"] != -100
    assert int(chosen.sum()) == round(0.15 * 3900)  # special tokens are not predicted
    assert torch.equal(example["labels"][chosen], ids[chosen])
    assert torch.equal(example["input_ids"][~chosen], ids[~chosen])
    assert not (chosen & (ids == tokenizer.eos_token_id)).any()


def test_four_fifths_are_hidden_a_tenth_is_swapped_a_tenth_stays(hidden, tokenizer):
    ids, example = hidden
    chosen = example["labels"] != -100
    inputs, number = example["input_ids"], int(chosen.sum())
    masked = (inputs == tokenizer.mask_token_id) & chosen
    same = (inputs == ids) & chosen
    assert int(masked.sum()) / number == pytest.approx(0.8, abs=0.05)
    assert int(same.sum()) / number == pytest.approx(0.1, abs=0.04)
    swapped = inputs[chosen & ~masked & ~same]
    assert not set(swapped.tolist()) & set(tokenizer.all_special_ids)


def test_what_is_masked_follows_from_the_example_and_its_seed_alone(tokenizer):
    masking = Masking(tokenizer, 0.15)
    ids = torch.arange(60, 260).repeat(3, 1)
    seeds = [(0, 5, 0), (0, 6, 0), (0, 5, 1)]  # run, example, epoch
    together = masking.hide(ids, None, seeds)["labels"]
    alone = masking.hide(ids[1:2], None, seeds[1:2])["labels"]
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], together[2])


def test_padding_is_not_masked(tokenizer):
    ids = torch.arange(60, 100)[None]
    mask = torch.arange(40)[None] < 10
    example = Masking(tokenizer, 0.9).hide(ids, mask, [(0,)])
    assert int((example["labels"] != -100).sum()) == 9
    assert (example["labels"][~mask] == -100).all()
    assert torch.equal(example["attention_mask"], mask.long())
