"""llama.cpp runs what was exported, and computes what transformers computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import save
from commands import make_source, text_file
from llama import TOLERANCE, by_llama, by_transformers, needs_llama, save_samoe, token_ids
from smelt import api

pytestmark = needs_llama

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 2},
    "qwen2_moe": {},
    "granitemoe": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "glm4_moe": {"n_group": 1, "topk_group": 1},
}
"""Each family as llama.cpp can have it."""


def same_model(folder: Path, path: Path, **settings: Any) -> "api.Written":
    """Export a checkpoint, and hold llama.cpp's logits and greedy tokens against transformers'."""
    done = api.export_gguf(folder, path, **settings)
    ids = token_ids(60)
    expected, greedy = by_transformers(folder, ids, 16)
    logits, made = by_llama(path, ids, 16)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    assert expected.std() > 0.5
    assert made == greedy
    return done


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(family, tmp_path):
    folder = save(family, tmp_path / "model", **FAMILIES[family])
    done = same_model(folder, tmp_path / "model.gguf")
    assert done.num_bytes == (tmp_path / "model.gguf").stat().st_size


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "mixtral"])
def test_a_tied_head_is_written_only_where_the_architecture_has_to_have_one(family, tmp_path):
    folder = save(family, tmp_path / "model", **FAMILIES[family], tie_word_embeddings=True)
    path = same_model(folder, tmp_path / "model.gguf").path
    from gguf import GGUFReader

    names = {tensor.name for tensor in GGUFReader(path).tensors}
    assert ("output.weight" in names) == (family != "mixtral")


@pytest.mark.filterwarnings("ignore:.*calibration tokens reach:UserWarning")
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_of_a_checkpoint_compressed_to_half_its_experts_too(family, tmp_path):
    folder = make_source(tmp_path / "model", family, **FAMILIES[family])
    api.compress(
        folder,
        tmp_path / "half",
        keep=0.5,
        calibration={"text": (str(text_file(tmp_path)),), "num_tokens": 600, "sequence_length": 32},
    )
    done = same_model(tmp_path / "half", tmp_path / "half.gguf")
    whole = api.export_gguf(folder, tmp_path / "whole.gguf")
    assert done.num_tensors == whole.num_tensors and done.num_bytes < whole.num_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": False},
        {"mlp_only_layers": [0]},
        {"mlp_only_layers": [0], "norm_topk_prob": False, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_qwen3_moe_that_qwen3moe_cannot_be_is_written_as_one_that_computes_the_same(
    changes, tmp_path
):
    folder = save("qwen3_moe", tmp_path / "model", **changes)
    done = same_model(folder, tmp_path / "model.gguf")
    assert done.architecture == "glm4moe"
    assert any("computes the same" in note for note in done.notes)


def test_a_frozen_samoe_model_runs_too(tmp_path):
    api.export(save_samoe(tmp_path / "samoe"), tmp_path / "frozen", dtype="float32")
    same_model(tmp_path / "frozen", tmp_path / "frozen.gguf")


def test_qwen3moe_divides_the_weights_by_their_sum_whatever_the_configuration_says(
    tmp_path, monkeypatch
):
    # Why the one above is not written as qwen3moe.
    from smelt.export import architectures, gguf_file

    folder = save("qwen3_moe", tmp_path / "model", norm_topk_prob=False)
    kept = architectures.find_target

    def as_qwen3moe(checkpoint):
        monkeypatch.setattr(checkpoint.config, "norm_topk_prob", True)
        return kept(checkpoint)

    monkeypatch.setattr(gguf_file, "find_target", as_qwen3moe)
    done = api.export_gguf(folder, tmp_path / "model.gguf")
    assert done.architecture == "qwen3moe"
    ids = token_ids(20)
    difference = by_llama(done.path, ids, 1)[0] - by_transformers(folder, ids, 1)[0]
    assert abs(difference).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=["linear", "yarn"],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_scaled_positions_are_scaled_alike(family, rope, tmp_path):
    folder = save(family, tmp_path / "model", rope_parameters=rope)
    same_model(folder, tmp_path / "model.gguf")
