"""Bytes and FLOPs of a decode step are those of what the step touches."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoints import save
from samoe.tiny import SHARING, build, tiny, tokens
from smelt.bench.decode import DecodeSettings, measure
from smelt.bench.subjects import load
from smelt.bench.traffic import SaMoECost

D, V, L = 16, 32, 4


def used(model):
    """Parameters that a step of all experts reads, once per layer that uses them; no tables."""
    tables = {"model.embed_tokens.weight", "model.embed_positions.weight", "lm_head.weight"}
    values = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name not in tables and ".pool" not in name
    )
    layout = model.config.layout
    pools = dict(zip(layout.shared(), model.model.pools, strict=True))
    for layer, module in zip(layout.layers, model.model.moe_layers(), strict=True):
        pool = pools.get(layer.group, module.pool)
        values += sum(p[: layer.experts].numel() for p in pool.parameters())
    return values


@pytest.mark.parametrize("sharing", SHARING)
def test_a_step_that_reaches_every_expert_reads_every_parameter_of_its_layers(sharing):
    model = build(tiny(sharing=sharing))
    hit = [layer.experts for layer in model.config.layout.layers]
    work = SaMoECost(model.config).step(3, 5, hit)
    rows_and_head = 3 * 2 * D + V * D
    cache = 2 * L * D * 5 * 3
    assert work.values == used(model) + rows_and_head + cache


@pytest.mark.parametrize("scope", ["layer", "expert"])
def test_what_leaving_out_an_entry_saves_is_what_is_no_longer_computed(scope):
    model = build(tiny(pool_size=3, alpha_scope=scope, num_experts_per_tok=2, has_bias=False))
    with torch.no_grad():
        for number, layer in enumerate(model.model.moe_layers()):
            layer.alpha.fill_(1.0)
            layer.alpha[: number + 1] = 0.1

    def counted(threshold):
        kept = [len(entries) for entries in model.skip_entries(threshold)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(tokens(6, 1))
        return kept, counter.get_total_flops()

    cost = SaMoECost(model.config)
    whole, whole_flops = counted(0.0)
    kept, fewer_flops = counted(0.5)
    assert (whole, kept) == ([3, 3], [2, 1])
    work = [cost.step(6, 0, [4, 4], entries) for entries in (whole, kept)]
    assert work[0].flops - work[1].flops == whole_flops - fewer_flops
    one = sum(p[0].numel() for p in model.model.pools[0].parameters()) / 3
    assert work[0].values - work[1].values == 3 * 4 * one


def test_uniform_routing_is_between_the_fewest_and_all_experts():
    cost = SaMoECost(tiny())
    values = [cost.step(batch, 0).expert_values for batch in (1, 2, 1000)]
    one = values[0] / 2  # one expert in each of two layers
    assert one * 2 < values[1] < one * 4
    assert values[2] == pytest.approx(one * 2 * 4)
    assert cost.step(2, 0, [1, 2]).expert_values == one * 3


def test_shared_experts_are_resident_once_and_read_by_every_layer():
    work = {s: SaMoECost(tiny(sharing=s)).step(100, 0) for s in ("none", "all")}
    assert work["none"].values == work["all"].values
    saved = work["none"].resident_values - work["all"].resident_values
    assert saved == pytest.approx(work["all"].expert_values / 2)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_stock_checkpoint_reads_its_active_parameters_for_one_token(is_tied, tmp_path):
    save("qwen3_moe", tmp_path / "m", tie_word_embeddings=is_tied)
    subject = load(str(tmp_path / "m"), dtype=torch.float32, device=torch.device("cpu"))
    model, config = subject.model, subject.model.config
    params = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    table = 0 if is_tied else config.vocab_size * config.hidden_size
    chosen = experts * config.num_experts_per_tok / config.num_experts
    work = subject.cost.step(1, 0)
    assert work.values == params - experts + chosen - table + config.hidden_size
    every = subject.cost.step(1, 0, [config.num_experts] * config.num_hidden_layers)
    assert every.expert_values == experts
    assert subject.cost.params == params
    assert subject.cost.active_params == params - experts + chosen


@pytest.mark.usefixtures("small_cache")
def test_a_step_does_twice_the_multiply_adds_of_the_matrices_it_reads(tmp_path):
    save("qwen3_moe", tmp_path / "m")
    subject = load(str(tmp_path / "m"), dtype=torch.float32, device=torch.device("cpu"))
    (step,) = measure([subject], DecodeSettings(batches=(1,), contexts=(0,), turns=1)).steps
    assert step.flops == pytest.approx(2 * step.bytes_read / 4, rel=0.05)  # norms are weights too
