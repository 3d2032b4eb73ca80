"""Leaving out pool entries is a model whose α is zero there."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from samoe.tiny import build, tiny, tokens
from smelt.bench import skip
from smelt.bench.skip import skip_quality
from smelt.checkpoint.inputs import Batch
from smelt.errors import CalibrationError, RecipeError

ALPHA = ([1.0, 0.1, -0.7], [0.5, -0.9, 0.05])


def model(values=ALPHA):
    made = build(tiny(pool_size=3))
    for layer, row in zip(made.model.moe_layers(), values, strict=True):
        layer.alpha.data.copy_(torch.tensor(row))
    return made


def batches():
    made = []
    for seed in (1, 2):
        ids = tokens(4, 12, seed=seed)
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        made.append(Batch({"input_ids": ids}, torch.ones_like(ids).bool(), labels=labels))
    return made


@torch.no_grad()
def mean_nats(made):
    logits = torch.cat([made(b.inputs["input_ids"]).logits for b in batches()])
    labels = torch.cat([b.labels for b in batches()])
    return cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def test_the_loss_at_a_threshold_is_that_of_the_entries_that_reach_it():
    made = model()
    found = skip_quality(made, batches(), (0.3, 0.6))
    assert [(s.threshold, s.kept) for s in found] == [
        (0.0, ((0, 1, 2), (0, 1, 2))),
        (0.3, ((0, 2), (0, 1))),
        (0.6, ((0, 2), (1,))),
    ]
    for one in found:
        zeroed = [[a if abs(a) >= one.threshold else 0.0 for a in row] for row in ALPHA]
        assert one.nats == pytest.approx(mean_nats(model(zeroed)), rel=1e-5)
        assert one.nats_more == pytest.approx(one.nats - found[0].nats, abs=1e-6)
        assert one.num_tokens == 2 * 4 * 11 and one.ms > 0
    assert found[0].nats_more_error == 0 and found[1].nats_more_error > 0


def test_the_model_is_whole_again():
    made = model()
    before = mean_nats(made)
    skip_quality(made, batches(), (0.6,))
    with pytest.raises(RecipeError, match="empties MoE layer 1"):
        skip_quality(made, batches(), (0.3, 0.95))
    assert mean_nats(made) == before
    assert all(layer.kept is None for layer in made.model.moe_layers())


def test_a_threshold_that_empties_a_layer_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(skip, "_measure", lambda model, batches: pytest.fail("measured"))
    with pytest.raises(RecipeError, match="empties MoE layer 1"):
        skip_quality(model(), batches(), (0.3, 0.95))


def test_batches_need_targets():
    plain = [Batch(b.inputs, b.mask) for b in batches()]
    with pytest.raises(CalibrationError, match="no targets"):
        skip_quality(model(), plain, (0.1,))
