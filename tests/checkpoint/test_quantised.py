"""Checkpoints that are published only quantised: read block by block, written plain in bf16."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import checkpoints
from end_to_end import batches_of, compress, load, logits_of
from smelt.checkpoint import mapped
from smelt.checkpoint.bind import find_layers
from smelt.checkpoint.shards import DTYPES, SINGLE, read, read_header, write_shard
from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import calibrate
from smelt.compress.facts import read_facts
from smelt.errors import CheckpointError

BLOCK = 16
FP8 = torch.float8_e4m3fn


def rewrite(folder: Path, quantisation: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """The checkpoint with these tensors and this quantization_config."""
    write_shard(folder / SINGLE, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8_blocks(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix in fp8 and the inverse scale of each of its blocks; edge blocks may be smaller."""
    rows, columns = (math.ceil(n / BLOCK) for n in weight.shape)
    values = torch.empty(weight.shape, dtype=FP8)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            place = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale = weight[place].float().abs().max() / 448
            if scale_dtype != torch.float32:
                scale = torch.exp2(scale.log2().ceil())
            scales[i, j] = scale
            values[place] = (weight[place].float() / scale).to(FP8)
    if scale_dtype == torch.uint8:
        return values, (scales.log2() + 127).to(torch.uint8)
    return values, scales.to(scale_dtype)


def plain_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """The slow reference: every number times the scale of its block, rounded once."""
    if scales.dtype == torch.uint8:
        scales = 2.0 ** (scales.float() - 127)
    out = torch.empty(values.shape)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[i, j] = values[i, j].float() * scales[i // BLOCK, j // BLOCK].float()
    return out.bfloat16()


@pytest.fixture(scope="module", params=["F32", "F8_E8M0", "U8"])
def fp8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deepseek_v3 checkpoint with its linear layers and experts in fp8."""
    mapped.register()
    dtype = DTYPES[request.param]
    folder = checkpoints.save(
        "deepseek_v3",
        tmp_path_factory.mktemp("fp8"),
        dtype=torch.bfloat16,
        moe_intermediate_size=32,  # of the others, intermediate_size is no multiple of the block
    )
    tensors = {}
    for key, entry in read_header(folder / SINGLE).items():
        weight = read(entry)
        is_linear = key.endswith(("_proj.weight", "_mqa.weight"))
        if is_linear and weight.dim() == 2:
            tensors[key], tensors[key + "_scale_inv"] = fp8_blocks(weight, dtype)
        else:
            tensors[key] = weight
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return rewrite(folder, quantisation, tensors)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt_oss checkpoint with its experts in mxfp4."""
    mapped.register()
    folder = checkpoints.save(
        "gpt_oss", tmp_path_factory.mktemp("mxfp4"), dtype=torch.bfloat16, intermediate_size=32
    )
    torch.manual_seed(0)
    tensors = {}
    for key, entry in read_header(folder / SINGLE).items():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = entry.shape
            shape = (experts, outer, inner // 32, 16)
            tensors[key + "_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8)
            tensors[key + "_scales"] = torch.randint(118, 126, shape[:-1], dtype=torch.uint8)
        else:
            tensors[key] = read(entry)
    return rewrite(folder, {"quant_method": "mxfp4"}, tensors)


def test_fp8_is_read_as_every_value_times_the_scale_of_its_block(fp8: Path) -> None:
    checkpoint = Checkpoint.open(fp8)
    checkpoint.check()
    entries = read_header(fp8 / SINGLE)
    keys = [key for key in entries if key.endswith("_scale_inv")]
    assert len(keys) == 3 * 5 + 3 * (1 + 2) + 2 * 3 * 8  # attention, dense and shared, experts
    for key in keys:
        name = key.removesuffix("_scale_inv")
        expected = plain_blocks(read(entries[name]), read(entries[key]))
        assert torch.equal(checkpoint.tensors[name].read(), expected), name
    expert = "model.layers.1.mlp.experts.3."
    fused = checkpoint.read("model.layers.1.mlp.experts.gate_up_proj")
    parts = [checkpoint.tensors[f"{expert}{p}_proj.weight"].read() for p in ("gate", "up")]
    assert torch.equal(fused[3], torch.cat(parts))
    assert not checkpoint.extra_keys


def test_fp8_is_read_as_transformers_reads_it(fp8: Path) -> None:
    """Where blocks are whole: transformers takes the block's size from the grid of scales."""
    settings = FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK))
    model = AutoModelForCausalLM.from_pretrained(
        fp8, quantization_config=settings, dtype=torch.bfloat16
    )
    checkpoint = Checkpoint.open(fp8)
    whole = {n: t for n, t in model.state_dict().items() if not {24} & set(t.shape)}
    assert any("experts.gate_up_proj" in name for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(checkpoint.read(name).to(tensor.dtype), tensor), name


def test_four_bit_values_under_fp8_scales_are_refused(fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((fp8 / "config.json").read_text())
    tensors = {key: read(entry) for key, entry in read_header(fp8 / SINGLE).items()}
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[key] = torch.zeros(32, 16, dtype=torch.int8)
    write_shard(tmp_path / SINGLE, tensors)
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj.*int8"):
        Checkpoint.open(tmp_path)


def test_mxfp4_is_read_as_transformers_reads_it(mxfp4: Path) -> None:
    checkpoint = Checkpoint.open(mxfp4)
    checkpoint.check()
    entries = read_header(mxfp4 / SINGLE)
    for layer in (0, 1):
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            expected = convert_moe_packed_tensors(
                read(entries[name + "_blocks"]), read(entries[name + "_scales"])
            )
            assert torch.equal(checkpoint.read(name), expected), name


def compress_to_half(folder: Path, output: Path) -> None:
    """The stock checkpoint of half the experts is plain bf16 and loads in plain transformers."""
    checkpoint = Checkpoint.open(folder)
    facts = read_facts(checkpoint)
    inputs = checkpoints.random_inputs(checkpoint.config)
    stats = calibrate(checkpoint, batches_of([inputs]), text="t", sample_tokens=100)
    settings = {"form": "stock", "method": "m-smoe", "experts": 4}
    _, plan = compress(checkpoint, stats, facts, output, settings)
    written = Checkpoint.open(output)
    assert "quantization_config" not in written.config_dict
    assert {t.dtype for t in written.tensors.values()} <= {torch.bfloat16, torch.float32}
    assert not [k for k in written.tensors if k.endswith(("_scale_inv", "_blocks", "_scales"))]
    assert plan.predicted.bytes_after == sum(t.num_bytes for t in written.tensors.values())
    model, info = load(output)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert {layer.num_experts for layer in find_layers(model)} == {4}
    assert logits_of(model, inputs).isfinite().all()
    for name in checkpoint.state:
        if "experts" not in name and "mlp.gate" not in name and "router" not in name:
            assert torch.equal(model.state_dict()[name], checkpoint.read(name)), name


def test_fp8_is_compressed_to_a_plain_checkpoint(fp8: Path, tmp_path: Path) -> None:
    compress_to_half(fp8, tmp_path / "out")


def test_mxfp4_is_compressed_to_a_plain_checkpoint(mxfp4: Path, tmp_path: Path) -> None:
    compress_to_half(mxfp4, tmp_path / "out")


OTHERS: list[dict[str, Any]] = [
    {"quant_method": name}
    for name in (
        "gptq",
        "awq",
        "bitsandbytes",
        "compressed-tensors",
        "aqlm",
        "torchao",
        "fbgemm_fp8",
    )
]


@pytest.mark.parametrize("quantisation", [*OTHERS, {"load_in_4bit": True}], ids=str)
def test_any_other_quantisation_is_refused_by_name(
    quantisation: dict[str, Any], tmp_path: Path
) -> None:
    folder = checkpoints.save("mixtral", tmp_path)
    entries = read_header(folder / SINGLE)
    rewrite(folder, quantisation, {key: read(entry) for key, entry in entries.items()})
    name = quantisation.get("quant_method", "load_in_4bit")
    with pytest.raises(CheckpointError, match=f"quantised with {name}"):
        Checkpoint.open(folder)


def test_fp8_without_its_scales_is_refused(fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((fp8 / "config.json").read_text())
    entries = read_header(fp8 / SINGLE)
    key = next(k for k in entries if k.endswith("_scale_inv"))
    write_shard(tmp_path / SINGLE, {k: read(e) for k, e in entries.items() if k != key})
    with pytest.raises(CheckpointError, match=key):
        Checkpoint.open(tmp_path)
