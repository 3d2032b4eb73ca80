"""What llama.cpp would compute otherwise is refused, in one message, and nothing is written."""

from pathlib import Path
from typing import Any

import pytest

from checkpoints import save
from commands import make_source, smelt, text_file
from llama import needs_gguf, save_samoe

pytestmark = needs_gguf

OTHERWISE: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {"num_key_value_heads": 2, "norm_topk_prob": True}, "never divides the top-k"),
    ("olmoe", {"num_key_value_heads": 2, "clip_qkv": 4.0}, "clip_qkv"),
    ("olmoe", {"num_key_value_heads": 1}, "fewer key–value heads"),
    ("qwen2_moe", {"norm_topk_prob": True}, "never divides the top-k"),
    ("qwen2_moe", {"mlp_only_layers": [0]}, "dense layers"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "at the beginning only"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}, "slides over 16"),
    ("qwen3_moe", {"hidden_act": "gelu"}, "gelu"),
    ("qwen3_moe", {"num_experts": 1025}, "1025 experts"),
    ("mixtral", {"sliding_window": 16}, "slides over 16"),
    ("glm4_moe", {"n_group": 2, "topk_group": 1}, "in groups"),
    ("gpt_oss", {}, "no GGUF writer"),
    ("switch_transformers", {}, "no GGUF writer"),
    (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type 'dynamic'",
    ),
]


def refused(folder: Path, to: Path, *words: object, says: tuple[str, ...]) -> None:
    done = smelt("export", folder, to, *words)
    lines = [line for line in done.err.splitlines() if line.startswith("smelt: error: ")]
    assert done.code == 2 and len(lines) == 1, done.err
    for part in says:
        assert part in lines[0], lines[0]
    assert not [path for path in to.parent.iterdir() if path.name.startswith(to.name)]


@pytest.mark.parametrize(("family", "changes", "says"), OTHERWISE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_would_be_another_model_there_is_refused(family, changes, says, tmp_path):
    folder = save(family, tmp_path / "model", **changes)
    refused(folder, tmp_path / "out.gguf", says=(says,))


def test_every_obstacle_is_named(tmp_path):
    folder = save(
        "olmoe", tmp_path / "model", num_key_value_heads=1, norm_topk_prob=True, clip_qkv=4.0
    )
    refused(
        folder, tmp_path / "out.gguf", says=("never divides", "clip_qkv", "fewer key–value heads")
    )


def test_a_mapped_checkpoint_is_refused(tmp_path):
    source = make_source(tmp_path / "model")
    made = smelt(
        *("compress", source, tmp_path / "mapped", "--keep", 0.5, "--form", "mapped"),
        *("--text", text_file(tmp_path), "--tokens", 600),
        *("--set", "calibration.sequence_length=32"),
    )
    assert made.code == 0, made.err
    refused(tmp_path / "mapped", tmp_path / "out.gguf", says=("mapped", "--form stock"))


def test_a_samoe_checkpoint_is_to_be_frozen_first(tmp_path):
    folder = save_samoe(tmp_path / "samoe")
    refused(folder, tmp_path / "out.gguf", says=("Freeze it first", "smelt export"))


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    folder = save("qwen3_moe", tmp_path / "model")
    out = tmp_path / "out.gguf"
    refused(folder, tmp_path / "out", "--gguf", says=("OUT.gguf",))
    refused(folder, out, "--quantise", "Q9", says=("Q8_0", "Q4_K"))
    refused(folder, out, "--quantise", "Q8_0", "--dtype", "float16", says=("give one",))
    refused(folder, out, "--dtype", "int8", says=("float32, bfloat16, float16",))
    refused(folder, out, "--to", "qwen3_moe", says=("--to",))
    refused(tmp_path / "none", out, says=("not a checkpoint folder",))


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    folder = save("qwen3_moe", tmp_path / "model")
    (tmp_path / "out.gguf").write_text("mine")
    done = smelt("export", folder, tmp_path / "out.gguf")
    assert done.code == 2 and "exists" in done.err
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_a_weight_missing_on_disk_is_found_before_anything_is_written(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save("qwen3_moe", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, tmp_path / "out.gguf", says=("model.norm.weight is missing",))


def test_without_the_gguf_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    from smelt.export import engine

    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    folder = save("qwen3_moe", tmp_path / "model")
    refused(folder, tmp_path / "out.gguf", says=("package gguf", "pip install 'smelt[gguf]'"))
