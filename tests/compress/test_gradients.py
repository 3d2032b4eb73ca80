"""Laws of the gradient statistics: what they are, what they do not depend on, how they are kept."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from checkpoints import save
from material import random_blocks
from reference.compression import pairwise_cosine
from smelt.checkpoint.bind import find_layers, read_bank
from smelt.checkpoint.inputs import Batch, make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress import gradients
from smelt.compress.calibrate import RoutingStats, calibrate
from smelt.compress.facts import read_facts
from smelt.compress.gradients import with_gradients
from smelt.compress.pipeline import run_plan
from smelt.compress.similarity import SIMILARITIES, Evidence
from smelt.errors import CalibrationError, PlanError
from smelt.recipe import CompressRecipe
from smelt.text import make_blocks

FAMILIES = ("qwen3_moe", "gpt_oss", "switch_transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    changes = {"switch_transformers": {"expert_capacity": 2}}  # a limit that must not bind
    return {name: save(name, root / name, **changes.get(name, {})) for name in FAMILIES}


def inputs_of(source: Checkpoint, size: int, padding: int = 0) -> list[Batch]:
    """Six sequences, `size` at a time, the last one short; both sides where there are two."""
    blocks = random_blocks(6, 12, padding=4)
    ids = torch.nn.functional.pad(blocks.input_ids, (0, padding))
    mask = torch.nn.functional.pad(blocks.mask, (0, padding))
    if not source.config.is_encoder_decoder:
        return make_batches(source, make_blocks(ids, mask, 1), size)
    found = []
    for start in range(0, 6, size):
        rows = slice(start, start + size)
        own, real = ids[rows], mask[rows]
        inputs = {
            "input_ids": own,
            "attention_mask": real.long(),
            "decoder_input_ids": own.flip(1) if not padding else own,
            "decoder_attention_mask": real.long(),
        }
        found.append(Batch(inputs, real, real, torch.where(real, own, -100)))
    return found


def statistics(folder: Path, size: int = 2, padding: int = 0) -> RoutingStats:
    source = Checkpoint.open(folder)
    found = inputs_of(source, size, padding)
    stats = calibrate(source, inputs_of(source, 2), text="t", sample_tokens=50)
    return with_gradients(stats, source, found)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_each_sequence_by_itself(folders, family):
    """The slow version: transformers' own loss, backward, and loops over pairs of experts."""
    folder = folders[family]
    stats, source = statistics(folder), Checkpoint.open(folder)
    auto = AutoModelForSeq2SeqLM if family.startswith("switch") else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 1000
    layers = find_layers(source.model)
    grams = {layer.name: torch.zeros(8, 8, dtype=torch.float64) for layer in layers}
    squares: dict[str, dict[str, torch.Tensor]] = {layer.name: {} for layer in layers}
    for batch in inputs_of(source, 1):
        length = int(batch.mask.sum())
        inputs = {n: v[:, :length] for n, v in batch.inputs.items()}
        model.zero_grad()
        logits = model(**inputs).logits[0].log_softmax(-1)
        targets = batch.labels[0, :length]
        loss = -sum(logits[t, y] for t, y in enumerate(targets) if y >= 0)
        loss.backward()
        for layer in layers:

            def grad(name):
                param = model.get_parameter(name)
                return torch.zeros_like(param) if param.grad is None else param.grad

            bank = read_bank(model.get_submodule(layer.experts), layer.experts, grad)
            tensors = bank.tensors()
            for i in range(8):
                for j in range(8):
                    one = sum(float((t[i] * t[j]).sum()) for t in tensors.values())
                    grams[layer.name][i, j] += one
            for name, t in tensors.items():
                squares[layer.name][name] = squares[layer.name].get(name, 0) + t.square()
    assert stats.fisher is not None and stats.fisher.num_sequences == 6
    for layer in layers:
        found = stats.layers[layer.name].gradient_gram
        torch.testing.assert_close(found, grams[layer.name], rtol=1e-3, atol=1e-6)
        assert found.diagonal().max() > 0
        for name, t in stats.fisher.read(layer.name).items():
            torch.testing.assert_close(t, squares[layer.name][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "switch_transformers"])
def test_batch_size_and_padding_do_not_matter(folders, family):
    first = statistics(folders[family], 1)
    others = [statistics(folders[family], 4)]
    if family == "qwen3_moe":
        others.append(statistics(folders[family], 6, padding=5))
    for other in others:
        for name, layer in first.layers.items():
            assert torch.equal(layer.gradient_gram, other.layers[name].gradient_gram)
            for key, t in first.fisher.read(name).items():
                assert torch.equal(t, other.fisher.read(name)[key])


def test_the_gradients_of_two_halves_add_up(folders):
    source = Checkpoint.open(folders["qwen3_moe"])
    parts = inputs_of(source, 3)
    whole = statistics(folders["qwen3_moe"])
    halves = [with_gradients(calibrate(source, [part], text="t"), source, [part]) for part in parts]
    joined = halves[0].merge(halves[1])
    assert joined.fisher.num_sequences == 6
    for name, layer in whole.layers.items():
        torch.testing.assert_close(joined.layers[name].gradient_gram, layer.gradient_gram)
        for key, t in whole.fisher.read(name).items():
            torch.testing.assert_close(joined.fisher.read(name)[key], t)
    plain = calibrate(source, [parts[1]], text="t")
    without = halves[0].merge(plain)
    assert without.fisher is None
    assert next(iter(without.layers.values())).gradient_gram is None


def test_saved_gradients_come_back_bit_for_bit_and_are_bound_to_the_rest(folders, tmp_path):
    stats = statistics(folders["qwen3_moe"])
    stats.save(tmp_path / "stats")
    back = RoutingStats.load(tmp_path / "stats")
    assert back.sha256 == stats.sha256
    names = sorted(p.name for p in (tmp_path / "stats").glob("fisher-*.safetensors"))
    assert names == ["fisher-000.safetensors", "fisher-001.safetensors"]
    for name in stats.layers:
        for key, t in stats.fisher.read(name).items():
            assert torch.equal(t, back.fisher.read(name)[key])
    first, second = (tmp_path / "stats" / name for name in names)
    first.write_bytes(second.read_bytes())  # a layer's file in the place of another's
    layer = next(iter(stats.layers))
    with pytest.raises(CalibrationError, match="is not the file"):
        RoutingStats.load(tmp_path / "stats").fisher.read(layer)
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(CalibrationError, match="cannot be read"):
        RoutingStats.load(tmp_path / "stats").fisher.read(layer)


def test_the_hash_of_statistics_without_gradients_is_what_it_was(folders):
    source = Checkpoint.open(folders["qwen3_moe"])
    plain = calibrate(source, inputs_of(source, 2), text="t", sample_tokens=50)
    assert plain.fisher is None
    assert plain.sha256 != with_gradients(plain, source, inputs_of(source, 2)).sha256


def test_gradient_similarity_is_the_cosine_over_all_sequences(folders):
    layer = next(iter(statistics(folders["qwen3_moe"]).layers.values()))
    values, vectors = torch.linalg.eigh(layer.gradient_gram)
    rows = vectors * values.clamp(min=0).sqrt()  # some vectors with these inner products
    found = SIMILARITIES["gradient"](Evidence(layer))
    torch.testing.assert_close(found, pairwise_cosine(rows), atol=1e-6, rtol=0)


def test_statistics_without_gradients_say_how_to_get_them(folders):
    source = Checkpoint.open(folders["qwen3_moe"])
    plain = calibrate(source, inputs_of(source, 2), text="t", sample_tokens=50)
    for settings in ({"method": "fisher"}, {"method": "m-smoe", "similarity": "gradient"}):
        recipe = CompressRecipe(source="s", output="o", experts=4, **settings)
        with pytest.raises(PlanError, match="smelt calibrate --gradients"):
            run_plan(source, plain, recipe, read_facts(source))


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(folders, monkeypatch):
    source = Checkpoint.open(folders["qwen3_moe"])
    stats = calibrate(source, inputs_of(source, 2), text="t", sample_tokens=50)
    monkeypatch.setattr(gradients, "available_memory", lambda: 1000)
    monkeypatch.setattr(gradients, "load_model", lambda *args: pytest.fail("it was read"))
    with pytest.raises(CalibrationError, match=r"gradients need about .* GB.*free"):
        with_gradients(stats, source, inputs_of(source, 2))


def test_inputs_without_targets_are_refused(folders):
    source = Checkpoint.open(folders["qwen3_moe"])
    stats = calibrate(source, inputs_of(source, 2), text="t", sample_tokens=50)
    bare = [Batch(b.inputs, b.mask) for b in inputs_of(source, 2)]
    with pytest.raises(CalibrationError, match="no targets"):
        with_gradients(stats, source, bare)
