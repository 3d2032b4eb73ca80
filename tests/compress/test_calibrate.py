"""Laws of the statistics: they are sums over real tokens, whatever the batches."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.laws import TOKENS, Ground, batches
from smelt.compress.calibrate import RoutingStats, calibrate
from smelt.compress.facts import bank_reader
from smelt.errors import CalibrationError
from smelt.experts import apply as expert_output


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground.make(tmp_path_factory.mktemp("source"))


def assert_same(a: RoutingStats, b: RoutingStats) -> None:
    for name, layer in a.layers.items():
        other = b.layers[name]
        assert layer.num_tokens == other.num_tokens
        assert torch.equal(layer.count, other.count)
        assert torch.equal(layer.sample_choice, other.sample_choice)
        for key, tensor in layer.tensors().items():
            torch.testing.assert_close(tensor, other.tensors()[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_statistics_do_not_depend_on_batch_size(ground, size):
    other = calibrate(ground.checkpoint, batches(size), text="tokens", sample_tokens=64)
    assert_same(ground.stats, other)


def test_statistics_do_not_depend_on_padding(ground):
    padded = calibrate(ground.checkpoint, batches(2, padding=9), text="tokens", sample_tokens=64)
    assert_same(ground.stats, padded)


def test_statistics_of_two_halves_add_up(ground):
    halves = batches(4)
    parts = [calibrate(ground.checkpoint, [half], text="t", sample_tokens=64) for half in halves]
    whole = parts[0].merge(parts[1])
    for name, layer in ground.stats.layers.items():
        assert torch.equal(layer.count, whole.layers[name].count)
        torch.testing.assert_close(
            layer.logit_gram, whole.layers[name].logit_gram, rtol=1e-5, atol=1e-5
        )


def test_every_statistic_is_what_its_definition_says(ground):
    """A slow, obvious second computation of one layer from a plain forward with hooks."""
    model = AutoModelForCausalLM.from_pretrained(ground.folder)
    layer = ground.facts.anatomy.layers[1]
    seen = {}
    experts = model.get_submodule(layer.experts)
    experts.register_forward_pre_hook(lambda m, args: seen.update(args=args))
    model.get_submodule(layer.router).register_forward_hook(
        lambda m, args, out: seen.update(logits=out[0])
    )
    with torch.no_grad():
        model(TOKENS)
    x, choice, weight = seen["args"]
    bank = bank_reader(ground.checkpoint, ground.facts)(layer.name)
    stats = ground.stats.layers[layer.name]
    for e in range(layer.num_experts):
        token, slot = torch.where(choice == e)
        f, g = expert_output(bank, e, x[token]).double(), weight[token, slot].double()
        norm = f.norm(dim=-1)
        close = {"rtol": 1e-4, "atol": 1e-6}
        assert int(stats.count[e]) == len(token)
        torch.testing.assert_close(stats.gate_sum[e], g.sum(), **close)
        torch.testing.assert_close(stats.saliency[e], (g * norm).sum(), **close)
        torch.testing.assert_close(stats.output_norm[e], norm.sum(), **close)
        torch.testing.assert_close(stats.mean_output[e], f.mean(0), **close)
        variance = (f - f.mean(0)).square().sum(-1).mean()
        torch.testing.assert_close(stats.output_var[e], variance, rtol=1e-3, atol=1e-6)
    h = seen["logits"].double()
    torch.testing.assert_close(stats.logit_gram, h.T @ h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.logit_sum, h.sum(0), rtol=1e-4, atol=1e-4)


def test_the_input_gram_is_collected_only_on_request(ground):
    assert all(layer.input_gram is None for layer in ground.stats.layers.values())
    with_gram = calibrate(
        ground.checkpoint, batches(2), text="t", sample_tokens=10_000, input_gram=True
    )
    for layer in with_gram.layers.values():
        x = layer.input_sample.double()  # the sample is all of it here
        torch.testing.assert_close(layer.input_gram, x.T @ x, rtol=1e-4, atol=1e-4)


def test_the_sample_is_drawn_by_its_seed_alone(ground):
    again = calibrate(ground.checkpoint, batches(8), text="t", sample_tokens=64)
    other = calibrate(ground.checkpoint, batches(8), text="t", sample_tokens=64, seed=1)
    name = ground.facts.layers[0].name
    sample = ground.stats.layers[name].sample_logits
    torch.testing.assert_close(sample, again.layers[name].sample_logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sample, other.layers[name].sample_logits)


def test_saved_statistics_come_back_bit_for_bit(ground, tmp_path):
    ground.stats.save(tmp_path)
    assert RoutingStats.load(tmp_path).sha256 == ground.stats.sha256


def test_damaged_or_absent_statistics_are_one_clear_error(ground, tmp_path):
    with pytest.raises(CalibrationError, match="smelt calibrate"):
        RoutingStats.load(tmp_path)
    ground.stats.save(tmp_path)
    file = tmp_path / "layer-001.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match="Calibrate again"):
        RoutingStats.load(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_on_cpu", [False, True])
def test_a_gpu_gives_the_statistics_of_the_cpu(ground, hidden_on_cpu):
    on_gpu = calibrate(
        ground.checkpoint,
        batches(2),
        text="tokens",
        sample_tokens=64,
        device="cuda",
        hidden_on_cpu=hidden_on_cpu,
    )
    for name, layer in ground.stats.layers.items():
        torch.testing.assert_close(
            layer.logit_gram, on_gpu.layers[name].logit_gram, rtol=1e-3, atol=1e-3
        )
        assert (layer.count - on_gpu.layers[name].count).abs().sum() <= 4  # near-ties may flip
