"""Laws of the optimiser's groups."""

import pytest
import torch

from checkpoints import random_model, tiny_config
from smelt.train.optimiser import hasten_embeddings


def groups(model):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


@pytest.mark.parametrize("family", ["switch_transformers", "qwen3_moe"])
def test_embeddings_alone_learn_at_their_own_rate(family):
    model = random_model(tiny_config(family))
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    hasten_embeddings(optimizer, model, 20.0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    table = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        expected = 2e-2 if parameter is table else 1e-3
        assert rates[id(parameter)] == pytest.approx(expected), name
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(table)] == 0.1  # as before


def test_a_factor_of_one_changes_nothing():
    model = random_model(tiny_config("switch_transformers"))
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3)
    hasten_embeddings(optimizer, model, 1.0)
    assert [len(g["params"]) for g in optimizer.param_groups] == [
        len(g["params"]) for g in groups(model)
    ]
