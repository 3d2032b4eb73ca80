"""The formulas of docs/scaling-out.md: checked on built models, and the document on them."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from smelt.bench import scale
from smelt.samoe import grouped
from smelt.samoe.blocks import Attention, DenseMLP
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM
from smelt.samoe.pool import ExpertPool
from smelt.train import distributed

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "scaling-out.md"
VARIANTS = (
    {},
    {"sharing": "none"},
    {"sharing": "dense"},
    {"sharing": "residual"},
    {"mix": "weight"},
    {"alpha_scope": "matrix"},
    {"num_experts_per_tok": 3},
)


def tiny(preset, **changes):
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_experts": 8,
        "vocab_size": 1000,
        "max_position_embeddings": 128,
        "capacity_factor": None,
    }
    return SaMoEConfig.from_preset(preset, **(sizes | changes))


def heavy(module):
    """What is gathered in bfloat16: parameters of attention, dense FFNs and experts."""
    kinds = (Attention, DenseMLP, ExpertPool)
    found = [m for m in module.modules() if isinstance(m, kinds)]
    return [parameter for m in found for parameter in m.parameters()]


def size(parameters):
    return sum(parameter.numel() for parameter in parameters)


# --- the formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [*VARIANTS, {"sharing": "top"}, {"shared_router": True}])
@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_what_travels_is_counted_as_the_built_model_has_it(preset, changes):
    config = tiny(preset, **changes)
    with torch.device("meta"):
        model = SaMoEForCausalLM(config)
    sizes = scale._sizes(config)
    blocks = list(model.model.layers)
    assert sizes.block_low == tuple(size(heavy(block)) for block in blocks)
    assert sizes.block_light == tuple(
        size(block.parameters()) - size(heavy(block)) for block in blocks
    )
    assert sizes.shared_low == size(model.model.pools.parameters())
    assert sizes.shared_light == size(model.parameters()) - size(
        parameter for block in [*blocks, model.model.pools] for parameter in block.parameters()
    )


class _AsOnAGPU:
    """Grouped products by the kernel of GPUs, which keeps other tensors than the CPU's loop."""

    @staticmethod
    def apply(x, weight, bias, scale, sizes):
        return grouped._kernel(x, weight, bias, torch.tensor(sizes), scale)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_activations_are_those_that_autograd_keeps(monkeypatch, preset, changes):
    monkeypatch.setattr(grouped, "_GroupedLinear", _AsOnAGPU)
    config = tiny(preset, **changes)
    model = SaMoEForCausalLM(config).train()
    for parameter in heavy(model):  # as they arrive
        parameter.data = parameter.data.bfloat16()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    N, V = 2 * 96, config.vocab_size
    ids = torch.randint(0, V, (2, 96))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        found = model(ids, output_router_logits=True, use_cache=False)
        loss = found.logits.flatten(0, 1).float().log_softmax(-1).square().sum()
        balance = [(layer.softmax(-1).sum(0) * V).sum() for layer in found.router_logits or ()]
        sum(balance, loss)
    counted = sum(storage.nbytes() for storage in kept.values())
    # of the logits' three copies autograd keeps the log-softmax; the head's weight is cast
    formula = scale.activations(config, N) - 6 * N * V + 2 * V * config.hidden_size
    assert formula == pytest.approx(counted, rel=0.01)


@contextmanager
def processes(number):
    """Within: this process is the first of so many, and none of the others is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("AR-MoE 125M-64E", 8),
        ("SaMoE 125M-64E", 128),  # fewer experts than GPUs
        ("SaMoE 760M-128E", 64),
    ],
)
def test_weights_per_gpu_are_what_fsdp_gives_the_first_process(name, number):
    config = scale.PAPER[name]
    with processes(number), torch.device("meta"):
        model = SaMoEForCausalLM(config)
        distributed.divide(model, is_low=True)
        held = 4 * sum(parameter.to_local().numel() for parameter in model.parameters())
    formula = scale.per_gpu(config, number, 2048)
    assert formula.weights == pytest.approx(held, rel=0.02)
    assert formula.adam == 2 * formula.gradients == 2 * formula.weights


def test_recomputed_activations_are_one_block_and_every_input():
    config = scale.PAPER["SaMoE 760M-128E"]
    full = scale.activations(config, 8192)
    less = scale.activations(config, 8192, is_recomputed=True)
    logits = 10 * 8192 * config.vocab_size
    assert less - logits < (full - logits) / 6
    assert scale.activations(config, 4096) == pytest.approx(full / 2, rel=1e-6)


def test_a_shared_pool_travels_once_and_own_experts_three_times():
    config = scale.PAPER["SaMoE 760M-128E"]
    own = scale.PAPER["AR-MoE 760M-128E"]
    pool = scale._sizes(config).shared_low
    experts = 6 * pool  # 12 layers of one entry, two entries for all
    rest = config.num_params() - pool
    assert scale.sent_per_step(config, 10**9) == pytest.approx(6 * pool, rel=0.15)
    assert scale.sent_per_step(own, 10**9) == pytest.approx(8 * experts, rel=0.05)
    assert own.num_params() - experts == pytest.approx(rest, rel=1e-4)
    assert scale.sent_per_step(config, 8, accumulate=3) == pytest.approx(
        3 * scale.sent_per_step(config, 8)
    )


# --- the document --------------------------------------------------------------------------------


def test_the_tables_of_the_document_are_those_of_the_formulas():
    text = DOCUMENT.read_text(encoding="utf-8")
    for lines in (scale.memory_table(), scale.traffic_table()):
        assert "\n".join(lines) in text, "\n".join(["Put this into the document:", *lines])


def test_the_document_names_what_exists():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert "torchrun --nproc-per-node 8 -m smelt train" in text
    for path in re.findall(r"`(src/[\w/.]+|tests/[\w/.]+)`", text):
        assert (DOCUMENT.parent.parent / path).exists(), path
