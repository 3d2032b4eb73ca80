"""Laws of the losses and figures of training, beside what is counted by hand."""

import math

import pytest
import torch

from smelt.text import make_blocks
from smelt.train import losses


def test_load_balance_is_one_when_even_and_the_number_of_experts_when_not():
    even = torch.eye(8).repeat(4, 1) * 100
    one = torch.zeros(32, 8)
    one[:, 3] = 100
    assert float(losses.load_balance([even], 1)) == pytest.approx(1)
    assert float(losses.load_balance([one], 1)) == pytest.approx(8)


def test_uneven_layers_do_not_make_up_for_each_other():
    first, second = torch.zeros(32, 2), torch.zeros(32, 2)
    first[:, 0], second[:, 1] = 100, 100
    assert float(losses.load_balance([first, second], 1)) == pytest.approx(2)


def test_entropy_is_one_for_even_load_and_zero_for_one_expert():
    assert losses.routing_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1)
    assert losses.routing_entropy(torch.tensor([0, 9, 0, 0])) == pytest.approx(0)
    assert losses.routing_entropy(torch.tensor([5, 5, 0, 0])) == pytest.approx(0.5)


def test_unigram_nats_are_those_counted_by_hand():
    nats = losses.unigram_nats(torch.tensor([2, 1, 0]), torch.tensor([0, 2]))
    assert nats == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


def test_padding_and_the_last_position_predict_nothing():
    blocks = make_blocks(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.ones(2, 3).bool(), 6)
    labels = blocks.input_ids.clone()
    labels[1, 2] = -100
    assert losses.targets(labels, is_causal=True).tolist() == [[6, 7, -100], [9, -100, -100]]
    assert torch.equal(losses.targets(labels, is_causal=False), labels)
