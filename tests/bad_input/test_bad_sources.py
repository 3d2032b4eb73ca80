"""A folder that is no good checkpoint ends in one clear message, and is left as it was."""

import json

import pytest
import torch

from bad_input.spoiling import INDEX, compress, edit_config, edit_weights, flip, refused
from checkpoints import random_model
from commands import smelt


def test_the_ground_is_good(good, text):
    done = compress(good, text)
    assert done.code == 0, done.err


def test_a_folder_without_a_configuration_is_no_checkpoint(tmp_path, text):
    (tmp_path / "source").mkdir()
    refused(compress(tmp_path / "source", text), "no config.json", "not a checkpoint")


def test_a_file_is_no_checkpoint(tmp_path, text):
    refused(compress(text, text, to="nothing"), "not a checkpoint folder", "hub id")


def test_a_path_that_is_not_there_is_no_checkpoint(tmp_path, text):
    refused(compress(tmp_path / "no" / "such", text), "not a checkpoint folder")


def test_a_hub_id_that_cannot_be_fetched(tmp_path, text):
    done = smelt("compress", "no-such-org/no-such-model", tmp_path / "out", "--keep", 0.5)
    refused(done, "no-such-org/no-such-model", "no such folder here", "hub")
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_is_not_json(good, text):
    (good / "config.json").write_text("{")
    refused(compress(good, text), "config.json", "not readable JSON")


def test_a_dense_model_has_nothing_to_merge(tmp_path, text):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    random_model(config).save_pretrained(tmp_path / "source")
    refused(compress(tmp_path / "source", text), "no experts", "nothing to merge")
    refused(smelt("inspect", tmp_path / "source"), "no experts")


def test_an_unknown_family_says_how_to_add_one(good, text):
    edit_config(good, model_type="unheard_of", architectures=["UnheardOf"])
    refused(compress(good, text), "unheard_of", "docs/add-a-family.md")


def test_a_family_that_is_not_covered_says_why(good, text):
    from transformers import DogeConfig

    config = DogeConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, is_moe=True, num_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    config.architectures = ["DogeForCausalLM"]
    config.save_pretrained(good)
    refused(compress(good, text), "doge", "not covered", "docs/add-a-family.md")


def test_a_missing_shard_is_named(sharded, text):
    shard = sorted(sharded.glob("model-0000*.safetensors"))[1]
    shard.unlink()
    refused(compress(sharded, text), shard.name, "missing")


def test_a_truncated_shard_is_named(sharded, text):
    shard = sorted(sharded.glob("model-0000*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(compress(sharded, text), shard.name, "truncated or damaged")


def test_a_shard_cut_to_nothing_is_named(sharded, text):
    shard = sorted(sharded.glob("model-0000*.safetensors"))[0]
    shard.write_bytes(b"")
    refused(compress(sharded, text), shard.name, "not a readable safetensors file")


@pytest.mark.parametrize("position", [0, 5, 8, 40, 90, 200])
def test_a_bit_flipped_in_a_header_is_found_or_harmless(good, text, position):
    file = good / "model.safetensors"
    flip(file, position)
    done = compress(good, text)
    if done.code:  # a flip inside the padding or the metadata changes nothing
        refused(done)


def test_a_bit_flipped_in_weights_is_found_by_a_known_checksum(good, text):
    first = compress(good, text, "--experts", 6, to="first")
    assert first.code == 0
    made = good.parent / "first"
    shard = sorted(made.glob("model-*.safetensors"))[1]
    flip(shard, shard.stat().st_size - 10)
    refused(compress(made, text), shard.name, "sha-256", "fetch it again")
    refused(smelt("inspect", made, "--verify"), shard.name)
    refused(smelt("calibrate", made, good.parent / "stats", "--text", text), shard.name)
    assert compress(made, text, "--no-verify", to="anyway").code == 0


def test_a_bit_flipped_in_the_hub_cache_is_found(good, text):
    import hashlib

    blobs = good.parent / "blobs"
    blobs.mkdir()
    data = (good / "model.safetensors").read_bytes()
    blob = blobs / hashlib.sha256(data).hexdigest()
    blob.write_bytes(data)
    (good / "model.safetensors").unlink()
    (good / "model.safetensors").symlink_to(blob)
    assert smelt("inspect", good, "--verify", "--json").json["verified_files"] == 1
    flip(blob, len(data) - 10)
    refused(compress(good, text), "model.safetensors", "sha-256")


def test_an_index_that_names_absent_tensors(sharded, text):
    index = json.loads((sharded / INDEX).read_text())
    shard = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.9.extra.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    refused(compress(sharded, text), "model.layers.9.extra.weight", shard)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(sharded, text, index):
    (sharded / INDEX).write_text(index)
    refused(compress(sharded, text), INDEX)


def test_an_index_that_points_outside_the_folder(sharded, text):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../shards/model.safetensors")
    (sharded / INDEX).write_text(json.dumps(index))
    refused(compress(sharded, text), "outside the folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["experts.3.up_proj", "gate.weight", "q_proj", "embed_tokens"])
def test_weights_that_are_not_finite_are_refused(good, text, value, name):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if name in key)
        tensors[key].view(-1)[7] = value

    edit_weights(good, spoil)
    refused(compress(good, text), "NaN or Inf")


def test_tensors_of_other_shapes_than_the_configuration_says(good, text):
    edit_config(good, moe_intermediate_size=24)
    refused(compress(good, text), "config.json says")


def test_fewer_experts_than_the_configuration_says(good, text):
    edit_config(good, num_experts=9, num_local_experts=9)
    refused(compress(good, text), "config.json says")


def test_a_layer_that_is_missing(good, text):
    edit_config(good, num_hidden_layers=3)
    refused(compress(good, text), "missing from the weights")


def test_pickled_weights_are_refused(good, text):
    (good / "model.safetensors").unlink()
    (good / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(compress(good, text), "pickled", "safetensors only")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_quantised_weights_are_refused_by_name(good, text, method):
    edit_config(good, quantization_config={"quant_method": method, "bits": 4})
    refused(compress(good, text), method, "cannot read")


def test_code_of_a_checkpoint_needs_permission(good, text):
    mark = good.parent / "ran"
    (good / "own.py").write_text(f"open({str(mark)!r}, 'w')")
    edit_config(good, model_type="own", auto_map={"AutoConfig": "own.Config"})
    refused(compress(good, text), "--trust-remote-code")
    assert not mark.exists(), "code of the checkpoint ran without permission"


def test_no_tokenizer(good, text):
    for file in good.glob("tokenizer*"):
        file.unlink()
    refused(compress(good, text), "tokenizer")
