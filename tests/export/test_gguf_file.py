"""Files are written whole or not at all, a layer's experts at a time, in the types asked for."""

import math
import weakref

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the package gguf is missing: pip install 'smelt[gguf]'")

from checkpoints import save  # noqa: E402
from llama import by_llama, by_transformers, needs_llama, token_ids  # noqa: E402
from smelt import api  # noqa: E402
from smelt.checkpoint.source import Checkpoint  # noqa: E402
from smelt.errors import CheckpointError  # noqa: E402
from smelt.export import types  # noqa: E402
from smelt.export.engine import EngineError  # noqa: E402
from smelt.export.gguf_file import GgufFile, export_gguf  # noqa: E402

WIDE = {"hidden_size": 256, "head_dim": 128, "moe_intermediate_size": 256, "num_hidden_layers": 1}
"""Rows of 256, which the K types divide into blocks."""


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_the_same_export_gives_the_same_bytes(tmp_path):
    folder = save("qwen3_moe", tmp_path / "model")
    one = api.export_gguf(folder, tmp_path / "one.gguf").path
    two = api.export_gguf(folder, tmp_path / "two.gguf").path
    assert one.read_bytes() == two.read_bytes()
    assert GgufFile(one).fingerprint == GgufFile(two).fingerprint


def test_another_weight_is_another_fingerprint(tmp_path):
    one = api.export_gguf(save("qwen3_moe", tmp_path / "a"), tmp_path / "one.gguf").path
    two = api.export_gguf(save("qwen3_moe", tmp_path / "b", seed=1), tmp_path / "two.gguf").path
    assert GgufFile(one).fingerprint != GgufFile(two).fingerprint


def test_every_expert_lies_in_the_place_of_its_number(tmp_path):
    folder = save("mixtral", tmp_path / "model", dtype=torch.float32)
    found = tensors(api.export_gguf(folder, tmp_path / "model.gguf").path)
    checkpoint = Checkpoint.open(folder)
    for layer in range(2):
        joined = checkpoint.read(f"model.layers.{layer}.mlp.experts.gate_up_proj").numpy()
        half = joined.shape[1] // 2
        for name, part in (("gate", joined[:, :half]), ("up", joined[:, half:])):
            np.testing.assert_array_equal(found[f"blk.{layer}.ffn_{name}_exps.weight"].data, part)


def test_only_a_layer_of_experts_is_in_memory_at_a_time(tmp_path, monkeypatch):
    folder = save("qwen3_moe", tmp_path / "model", num_hidden_layers=6, num_experts=64)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = Checkpoint.read

    def watched(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        held = [t for ref in alive if (t := ref()) is not None]
        most = max(most, sum(t.nbytes for t in held))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    checkpoint = Checkpoint.open(folder)
    export_gguf(checkpoint, tmp_path / "model.gguf")
    names = [name for name in checkpoint.state if name.startswith("model.layers.0.mlp.experts.")]
    layer = checkpoint.bytes_of(names)
    assert most == layer < checkpoint.bytes_of(checkpoint.state) / 4


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    folder = save("qwen3_moe", tmp_path / "model", dtype=torch.float32)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="beyond float16"):
        api.export_gguf(folder, tmp_path / "out" / "model.gguf", dtype="float16", verify=False)
    assert not list((tmp_path / "out").iterdir())


def test_each_type_of_weights_is_kept_bit_for_bit(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folder = save("qwen3_moe", tmp_path / str(dtype), dtype=dtype)
        path = api.export_gguf(folder, tmp_path / f"{dtype}.gguf").path
        name = "model.layers.0.self_attn.q_proj.weight"
        stored = Checkpoint.open(folder).read(name)
        found = tensors(path)["blk.0.attn_q.weight"].data
        assert stored.view(torch.uint8).numpy().tobytes() == found.tobytes()


# --- quantised -----------------------------------------------------------------------------------


@needs_llama
def test_q8_0_is_bit_for_bit_what_the_gguf_library_makes(tmp_path):
    folder = save("qwen3_moe", tmp_path / "model", dtype=torch.float32)
    path = api.export_gguf(folder, tmp_path / "model.gguf", quantise="Q8_0").path
    stored = Checkpoint.open(folder).read("model.layers.0.self_attn.q_proj.weight").numpy()
    expected = gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(tensors(path)["blk.0.attn_q.weight"].data, expected)


@needs_llama
def test_chunks_give_the_bytes_of_the_whole(monkeypatch):
    rows = torch.randn(37, 256, generator=torch.Generator().manual_seed(0))
    whole = types.encode("w", rows, types.Kind.Q4_K)
    monkeypatch.setattr(types, "_CHUNK", 5 * 256)
    np.testing.assert_array_equal(types.encode("w", rows, types.Kind.Q4_K), whole)


@needs_llama
@pytest.mark.parametrize(
    ("scheme", "bits", "error"),
    [("Q8_0", 8.5, 0.006), ("Q6_K", 6.5625, 0.025), ("Q4_K", 4.5, 0.09), ("Q2_K", 2.625, 0.4)],
)
def test_a_scheme_takes_its_bits_and_is_as_near_as_its_bits_allow(scheme, bits, error, tmp_path):
    folder = save("qwen3_moe", tmp_path / "model", **WIDE, dtype=torch.float32)
    done = api.export_gguf(folder, tmp_path / "model.gguf", quantise=scheme)
    assert not done.wider
    tensor = tensors(done.path)["blk.0.ffn_down_exps.weight"]
    assert tensor.n_bytes == tensor.n_elements * bits / 8
    stored = Checkpoint.open(folder).read("model.layers.0.mlp.experts.down_proj").numpy()
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(stored.shape)
    off = math.sqrt(((found - stored) ** 2).mean() / (stored**2).mean())
    assert error / 3 < off < error


@needs_llama
def test_quantised_files_run_and_stay_near(tmp_path):
    folder = save("qwen3_moe", tmp_path / "model", **WIDE)
    ids = token_ids(40)
    expected = by_transformers(folder, ids, 1)[0]
    off = {}
    for scheme in ("Q8_0", "Q4_K", "Q2_K"):
        path = api.export_gguf(folder, tmp_path / f"{scheme}.gguf", quantise=scheme).path
        off[scheme] = float(np.abs(by_llama(path, ids, 1)[0] - expected).mean() / expected.std())
    assert 0 < off["Q8_0"] < 0.05 < off["Q4_K"] < off["Q2_K"]


@needs_llama
def test_routers_and_norms_are_never_quantised(tmp_path):
    folder = save("qwen2_moe", tmp_path / "model")
    found = tensors(api.export_gguf(folder, tmp_path / "model.gguf", quantise="Q8_0").path)
    for name, tensor in found.items():
        is_small = "norm" in name or "gate_inp" in name or name.endswith("bias")
        assert (tensor.tensor_type.name == "F32") == is_small, name


@needs_llama
def test_rows_that_do_not_divide_get_a_wider_type_and_are_named(tmp_path):
    folder = save("qwen3_moe", tmp_path / "model")  # rows of 32 and 16
    done = api.export_gguf(folder, tmp_path / "model.gguf", quantise="Q4_K")
    found = {name: tensor.tensor_type.name for name, tensor in tensors(done.path).items()}
    assert found["blk.0.attn_q.weight"] == "Q5_0"  # 32
    assert found["blk.0.ffn_down_exps.weight"] == "F16"  # 16
    assert found["token_embd.weight"] == "Q8_0"  # the head, tied: six bits, if its rows were 256
    assert set(done.wider) == {name for name, kind in found.items() if kind != "F32"}


def test_a_type_of_half_bits_is_counted_exactly():
    assert types.bytes_of((4, 256), types.Kind.Q4_K) == 4 * 144
    assert types.bytes_of((2, 64), types.Kind.Q8_0) == 2 * 2 * 34


def test_without_llama_cpp_a_quantised_file_is_refused_and_a_plain_one_is_not(
    tmp_path, monkeypatch
):
    from smelt.export import engine, gguf_file

    def absent():
        raise EngineError(f"llama.cpp is not installed here: {engine.INSTALL}.")

    monkeypatch.setattr(gguf_file, "library", absent)
    folder = save("qwen3_moe", tmp_path / "model")
    with pytest.raises(EngineError, match="smelt\\[gguf\\]"):
        api.export_gguf(folder, tmp_path / "model.gguf", quantise="Q8_0")
    assert not (tmp_path / "model.gguf").exists()
    api.export_gguf(folder, tmp_path / "model.gguf")


@needs_llama
def test_a_damaged_file_is_refused(tmp_path):
    from smelt.export.engine import Engine

    path = api.export_gguf(save("mixtral", tmp_path / "model"), tmp_path / "model.gguf").path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match="cannot load"):
        Engine(path, context=8)
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        GgufFile(tmp_path / "text.gguf")


def test_tensors_that_transformers_does_not_use_are_left_out_and_said(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save("glm4_moe", tmp_path / "model", n_group=1, topk_group=1)
    weights = load_file(folder / "model.safetensors")
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(32, 64)}
    save_file(weights | extra, folder / "model.safetensors", {"format": "pt"})
    done = api.export_gguf(folder, tmp_path / "model.gguf", verify=False)
    assert any("model.layers.3.eh_proj.weight" in note for note in done.notes)
    assert not [name for name in tensors(done.path) if name.startswith("blk.3.")]
