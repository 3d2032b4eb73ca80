"""The formula of training memory counts what autograd keeps and what the allocator gave."""

from itertools import accumulate

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from smelt.bench.memory import saved_values, training_bytes
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM

BATCH, LENGTH = 2, 64
VARIANTS = {
    "paper": ("paper", {}),
    "AR-MoE": ("paper", {"sharing": "none"}),
    "residual": ("paper", {"sharing": "residual"}),
    "union": ("paper", {"sharing": "union"}),
    "dense": ("paper", {"sharing": "dense"}),
    "weight": ("paper", {"mix": "weight"}),
    "matrix": ("paper", {"alpha_scope": "matrix", "pool_size": 3}),
    "modern": ("modern", {}),
    "modern, grouped heads": ("modern", {"num_key_value_heads": 2, "mix": "weight"}),
}


def make(preset, **fields):
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_experts": 4,
        "vocab_size": 256,
        "max_position_embeddings": LENGTH,
        "capacity_factor": None,
    }
    config = SaMoEConfig.from_preset(preset, **(sizes | fields))
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH))
    return config, SaMoEForCausalLM(config).train(), ids


@pytest.mark.parametrize("name", VARIANTS)
def test_the_activations_are_what_autograd_keeps(name):
    preset, fields = VARIANTS[name]
    config, model, ids = make(preset, **fields)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held: no address is given twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, labels=ids)
    values = sum(storage.nbytes() for storage in kept.values()) / 4
    assert saved_values(config, ids.numel()) == pytest.approx(values, rel=0.01)


SIZES = {
    "experts": ({"num_experts": 32}, 1.0),
    "activations": ({"num_experts": 2, "vocab_size": 64}, 8.0),
    "logits": ({"num_experts": 2, "vocab_size": 4096}, 4.0),
    "embeddings": ({"num_experts": 2, "vocab_size": 8192}, 0.25),
}
"""What takes the memory: fields, and how long the sequences are."""


@pytest.mark.parametrize("name", ["paper", "AR-MoE", "dense", "weight", "modern"])
@pytest.mark.parametrize("size", SIZES)
def test_the_peak_is_that_of_the_allocator(size, name):
    preset, fields = VARIANTS[name]
    few, times = SIZES[size]
    length = int(LENGTH * times)
    config, model, _ = make(preset, **(fields | few | {"max_position_embeddings": length}))
    ids = torch.randint(config.vocab_size, (BATCH, length))
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    step()
    fixed = 3 * 4 * config.num_params()  # weights and moments, there before the profiled step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    peak = fixed + max(accumulate(changes))
    assert training_bytes(config, ids.numel()) == pytest.approx(peak, rel=0.05)


def test_mixing_activations_keeps_more_and_sharing_holds_less():
    sizes = {
        name: training_bytes(make(*VARIANTS[name][:1], **VARIANTS[name][1])[0], 1)
        for name in ("paper", "AR-MoE")
    }
    assert sizes["paper"] == pytest.approx(sizes["AR-MoE"], rel=0.1)  # P = L: as many experts
    few = [saved_values(make("paper", pool_size=p)[0], 100) for p in (1, 2, 3)]
    assert few[1] - few[0] == pytest.approx(few[2] - few[1], rel=0.01)
    assert few[0] < few[1]
