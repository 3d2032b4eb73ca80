"""Keys that transformers does not build: prediction layers with experts go, all others stay."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoints
from end_to_end import batches_of, compress, load
from smelt.checkpoint import mapped
from smelt.checkpoint.shards import SINGLE, read, read_header, write_shard
from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import calibrate
from smelt.compress.facts import read_facts

CASES = {  # the block that is copied, what it is called as a prediction layer, the field
    "deepseek_v3": ("model.layers.2.", "model.layers.3.", "num_nextn_predict_layers"),
    "glm4_moe": ("model.layers.2.", "model.layers.3.", "num_nextn_predict_layers"),
    "qwen3_next": ("model.layers.1.", "mtp.layers.0.", "mtp_num_hidden_layers"),
    "minimax": ("model.layers.1.", "model.mtp.layers.0.", "num_mtp_layers"),
}
STRAY = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
    "model.layers.1.mlp.experts.note": torch.tensor([3]),
    "quite.unknown": torch.randn(3, 2, generator=torch.Generator().manual_seed(1)),
}


def with_prediction_layer(family: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint with one prediction layer and stray keys; the layer's keys."""
    checkpoints.save(family, folder)
    old, new, field = CASES[family]
    tensors = {key: read(entry) for key, entry in read_header(folder / SINGLE).items()}
    layer = {key.replace(old, new): t for key, t in tensors.items() if key.startswith(old)}
    root = "mtp." if new.startswith("mtp.") else new.replace("layers.0.", "")
    layer |= {f"{root}eh_proj.weight": torch.randn(32, 64), f"{root}enorm.weight": torch.ones(32)}
    write_shard(folder / SINGLE, tensors | layer | STRAY)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: 1}))
    return folder, layer


@pytest.mark.parametrize("family", CASES)
def test_a_prediction_layer_goes_with_its_field_and_stray_keys_stay(
    family: str, tmp_path: Path
) -> None:
    mapped.register()
    folder, layer = with_prediction_layer(family, tmp_path / "source")
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    assert set(checkpoint.extra_keys) == set(layer) | set(STRAY)
    facts = read_facts(checkpoint)
    assert set(facts.anatomy.mtp_keys) == set(layer)
    batches = batches_of([checkpoints.random_inputs(checkpoint.config)])
    stats = calibrate(checkpoint, batches, text="t", sample_tokens=100)
    for form in ("stock", "mapped", "expanded"):
        settings = {"form": form, "method": "m-smoe", "experts": 4}
        output, plan = compress(checkpoint, stats, facts, tmp_path / form, settings)
        written = Checkpoint.open(output)
        written.check()
        assert written.config_dict[CASES[family][2]] == 0
        assert set(written.extra_keys) == set(STRAY)
        for key, tensor in STRAY.items():
            assert torch.equal(written.tensors[key].read(), tensor), key
        assert plan.predicted.bytes_after == sum(t.num_bytes for t in written.tensors.values())
        dropped = json.loads((output / "smelt" / "provenance.json").read_text())["dropped"]
        assert set(dropped) == set(layer)
        _, info = load(output)
        assert set(info.pop("unexpected_keys")) <= set(STRAY)
        assert not any(info.values()), info


def test_a_prediction_layer_without_experts_stays(tmp_path: Path) -> None:
    folder, layer = with_prediction_layer("qwen3_next", tmp_path / "source")
    tensors = {key: read(entry) for key, entry in read_header(folder / SINGLE).items()}
    dense = {k for k in layer if ".experts." not in k}
    write_shard(folder / SINGLE, {k: t for k, t in tensors.items() if k not in set(layer) - dense})
    checkpoint = Checkpoint.open(folder)
    facts = read_facts(checkpoint)
    assert not facts.anatomy.mtp_keys
    batches = batches_of([checkpoints.random_inputs(checkpoint.config)])
    stats = calibrate(checkpoint, batches, text="t", sample_tokens=100)
    settings = {"form": "stock", "method": "m-smoe", "experts": 4}
    written = Checkpoint.open(compress(checkpoint, stats, facts, tmp_path / "out", settings)[0])
    assert set(written.extra_keys) == dense | set(STRAY)
    assert written.config_dict["mtp_num_hidden_layers"] == 1
