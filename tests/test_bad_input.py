"""Bad input ends in one clear message and exit code 2; nothing is half-written, nothing is lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import random_model
from commands import QUICK, Outcome, contents, make_source, smelt, text_file
from smelt.checkpoint import shards, sink

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good checkpoint in one file, the same in shards, and statistics of it."""
    folder = tmp_path_factory.mktemp("ground")
    good = make_source(folder / "good")
    from transformers import AutoModelForCausalLM

    shutil.copytree(good, folder / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(good)
    model.save_pretrained(folder / "shards", max_shard_size="30KB")
    done = smelt("calibrate", good, folder / "stats", "--text", text_file(folder), *QUICK_TEXT)
    assert done.code == 0, done.err
    done = smelt("plan", good, "--stats", folder / "stats", "--keep", 0.5, "-o", folder / "p.json")
    assert done.code == 0, done.err
    return folder


QUICK_TEXT = ("--set", "sequence_length=32", "--tokens", "600")


@pytest.fixture
def good(ground: Path, tmp_path: Path) -> Path:
    """A copy of the good checkpoint, to be spoilt."""
    return Path(shutil.copytree(ground / "good", tmp_path / "source"))


@pytest.fixture
def sharded(ground: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ground / "shards", tmp_path / "source"))


@pytest.fixture
def text(ground: Path) -> Path:
    return text_file(ground)


def refused(done: Outcome, *parts: str) -> None:
    """Exit code 2 and one line on stderr, which says all of these."""
    assert done.code == 2, (done.code, done.out, done.err)
    lines = [line for line in done.err.splitlines() if not line.startswith("smelt: warning")]
    assert len(lines) == 1 and lines[0].startswith("smelt: error: "), done.err
    assert "Traceback" not in done.err
    assert not done.out
    for part in parts:
        assert part.lower() in done.err.lower(), (part, done.err)


def compress(source: Path, text: Path, *words: object, to: str = "out") -> Outcome:
    """Compress to half; what was there stays as it was, and no output appears after a failure."""
    place = source.parent / to
    before = contents(source) if source.is_dir() else {}
    existed = place.exists()
    budget = () if {"--keep", "--experts", "--size", "--recipe"} & set(words) else ("--keep", "0.5")
    done = smelt("compress", source, place, "--text", text, *QUICK, *budget, *words)
    if source.is_dir():
        now = contents(source)
        assert {name: now[name] for name in before} == before, "the source was changed"
    assert done.code == 0 or existed or not place.exists(), "an output was left behind"
    return done


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def flip(file: Path, position: int) -> None:
    """Flip one bit."""
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


def test_the_ground_is_good(good, text):
    done = compress(good, text)
    assert done.code == 0, done.err


# --- the source ----------------------------------------------------------------------------------


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


# --- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1.5, -0.5, 0.01])
def test_a_share_out_of_range(good, text, keep):
    refused(compress(good, text, "--keep", keep), "keep")


@pytest.mark.parametrize("experts", [0, 99, -3])
def test_a_count_out_of_range(good, text, experts):
    refused(compress(good, text, "--experts", experts), "experts")


@pytest.mark.parametrize("command", [("compress",), ("plan", "--stats", "s")])
def test_a_budget_in_percent_is_told_how_to_say_it(good, command):
    words = (*command, good, *(["out"] if command == ("compress",) else []))
    refused(smelt(*words, "--experts", "50%"), "--experts 50%", "--keep 0.5")
    for share in ("--keep", "--size"):
        refused(smelt(*words, share, "50%"), f"{share} 50%", "like 0.5")


def test_two_budgets_or_none(good, text):
    refused(compress(good, text, "--experts", 4, "--keep", 0.5), "set one of experts")
    done = smelt("compress", good, good.parent / "out", "--text", text)
    refused(done, "set one of experts (a count), keep (a share) and size")


def test_a_budget_of_bytes_that_nothing_fits_is_refused_before_anything_is_calibrated(good, text):
    refused(compress(good, text, "--size", 0.001), "Allow more")
    tight = ("--form", "mapped", "--experts", 2, "--set", "budget=measured")
    refused(compress(good, text, *tight, "--set", "min_per_layer=4"), "at least")
    assert not list(good.parent.glob("*.partial"))


def test_fewer_experts_than_a_token_uses(good, text):
    refused(compress(good, text, "--experts", 1), "chooses 2 per token", "nearest", "mapped form")


def test_a_count_that_group_limited_routing_cannot_hold(tmp_path, text):
    make_source(tmp_path / "source", "deepseek_v3")
    done = compress(tmp_path / "source", text, "--experts", 5)
    refused(done, "nearest count that works is 6", "groups of experts")


def test_a_form_that_the_method_cannot_have(good, text):
    refused(compress(good, text, "--set", "budget=global"), "stock form", "mapped")
    refused(compress(good, text, "--form", "zip"), "form")


def test_an_excluded_layer_that_is_not_there(good, text):
    done = compress(good, text, "--form", "mapped", "--set", "excluded=[model.layers.9.mlp]")
    refused(done, "model.layers.9.mlp", "model.layers.0.mlp")


# --- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_text_that_is_empty(good, tmp_path, data):
    (tmp_path / "t.txt").write_bytes(data)
    refused(compress(good, tmp_path / "t.txt"), "t.txt", "text")


@pytest.mark.parametrize("data", [bytes(range(256)) * 40, b"text\0text" * 500])
def test_text_that_is_binary(good, tmp_path, data):
    (tmp_path / "t.txt").write_bytes(data)
    refused(compress(good, tmp_path / "t.txt"), "t.txt", "not text")


def test_text_that_is_not_there(good, tmp_path):
    refused(compress(good, tmp_path / "no.txt"), "no.txt", "no such text")


def test_fewer_tokens_than_useful_warn_and_go_on(good, tmp_path):
    (tmp_path / "t.txt").write_text("Only a few words are here, and no more.")
    done = compress(good, tmp_path / "t.txt")
    assert done.code == 0
    assert "600 were asked" in done.err and "their scores are noise" in done.err
    assert all(line.startswith("smelt: warning: ") for line in done.err.splitlines())


# --- the output ----------------------------------------------------------------------------------


def test_an_output_that_exists_is_left_alone(good, text):
    (good.parent / "out").mkdir()
    (good.parent / "out" / "mine.txt").write_text("mine")
    refused(compress(good, text), "exists", "overwrites nothing")
    assert (good.parent / "out" / "mine.txt").read_text() == "mine"


def test_an_output_inside_the_source(good, text):
    done = smelt("compress", good, good / "inside", "--keep", 0.5, "--text", text)
    refused(done, "inside the source")
    assert not (good / "inside").exists()
    refused(smelt("compress", good, good, "--keep", 0.5), "inside the source")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written(good, text):
    closed = good.parent / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    done = smelt("compress", good, closed / "out", "--keep", 0.5, "--text", text)
    closed.chmod(0o700)
    refused(done, "cannot be written")
    assert not any(closed.iterdir())


def test_too_little_space_is_seen_before_writing(good, text, monkeypatch):
    monkeypatch.setattr(
        sink.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    refused(compress(good, text), "free", "the output needs")


@pytest.mark.parametrize("stats_too", [False, True])
def test_a_disk_that_fills_up_keeps_what_is_done(good, text, monkeypatch, stats_too):
    write = shards.write_shard

    def full(file: Path, tensors: Any) -> str:
        if stats_too or file.name.startswith("model-00002"):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return write(file, tensors)

    monkeypatch.setattr(sink, "write_shard", full)
    monkeypatch.setattr("smelt.compress.calibrate.write_shard", full)
    refused(compress(good, text), "No space left")
    monkeypatch.undo()
    assert compress(good, text).code == 0  # the same command goes on


# --- statistics and plans ------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint that differs in its weights only."""
    return make_source(tmp_path / "other", seed=1)


def test_statistics_of_another_checkpoint(ground, other, text):
    refused(compress(other, text, "--stats", ground / "stats"), "another", "calibrate")
    done = smelt("plan", other, "--stats", ground / "stats", "--keep", 0.5)
    refused(done, "statistics are of checkpoint")


def test_a_plan_of_another_checkpoint(ground, other):
    done = smelt("apply", other, ground / "p.json", other.parent / "out")
    refused(done, "the plan is of checkpoint")
    assert not (other.parent / "out").exists()


def test_statistics_that_are_none(good, text, tmp_path):
    refused(compress(good, text, "--stats", tmp_path / "nothing"), "no statistics there")


def test_statistics_that_are_damaged(ground, good, text, tmp_path):
    stats = Path(shutil.copytree(ground / "stats", tmp_path / "stats"))
    file = stats / "layer-000.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    refused(compress(good, text, "--stats", stats), "statistics cannot be read")


def test_a_plan_that_is_damaged(ground, good, tmp_path):
    plan = tmp_path / "p.json"
    plan.write_text((ground / "p.json").read_text()[:-200])
    refused(smelt("apply", good, plan, tmp_path / "out"), "p.json")
    refused(smelt("apply", good, tmp_path / "none.json", tmp_path / "out"), "no such plan")


# --- settings ------------------------------------------------------------------------------------


def test_a_misspelt_setting_names_those_there_are(good, text, tmp_path):
    refused(compress(good, text, "--set", "simlarity=weights"), "simlarity", "similarity")
    done = compress(good, text, "--set", "calibration.tokens=5")
    refused(done, "calibration.tokens", "num_tokens")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("keep: 0.5\nmehtod: reap\n")
    refused(compress(good, text, "--recipe", recipe), "r.yaml", "mehtod", "method")


@pytest.mark.parametrize(("recipe", "says"), [("[1, 2]", "mapping"), ("a: [", "not valid YAML")])
def test_a_recipe_that_is_none(good, text, tmp_path, recipe, says):
    (tmp_path / "r.yaml").write_text(recipe)
    refused(compress(good, text, "--recipe", tmp_path / "r.yaml"), says)
    refused(compress(good, text, "--recipe", tmp_path / "no.yaml"), "no such recipe file")


def test_names_that_do_not_exist(good, text):
    refused(compress(good, text, "--method", "m-smo"), "m-smo", "did you mean 'm-smoe'")
    refused(compress(good, text, "--method", "no_such_module:f"), "cannot be imported")
    refused(compress(good, text, "--set", "score=loudness"), "score", "count")
    refused(compress(good, text, "--set", "similarity=nearness"), "nearness")
    refused(compress(good, text, "--set", "router=none"), "router")
    refused(compress(good, text, "--set", "weights=heavy"), "weights")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(good, text):
    refused(compress(good, text, "--device", "cuda"), "cuda", "here are: cpu")


@pytest.mark.parametrize("device", ["tpu9000", "meta", "gpu:x"])
def test_a_device_that_does_not_exist(good, text, device):
    refused(compress(good, text, "--device", device), device, "here are: cpu")


def test_a_flag_that_does_not_exist(good):
    done = smelt("compress", good, good.parent / "out", "--kep", 0.5)
    assert done.code == 2
    assert "--kep" in done.err and "Traceback" not in done.err


# --- signals -------------------------------------------------------------------------------------

SLOW = """
import sys, time
from smelt.checkpoint import sink
write = sink.write_shard
def slow(file, tensors):
    time.sleep(0.4)
    return write(file, tensors)
sink.write_shard = slow
from smelt.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_to_the_same_bytes(good, text, tmp_path, monkeypatch, sent):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    words = ["compress", str(good), "out", "--keep", "0.5", "--text", str(text), *QUICK]
    monkeypatch.chdir(tmp_path / "a")
    assert smelt(*words).code == 0
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words],
        cwd=tmp_path / "b",
        env={
            **os.environ,
            "PYTHONPATH": str(Path(sink.__file__).parents[2]),
        },  # what is tested here
        stderr=subprocess.PIPE,
        text=True,
    )
    staging = tmp_path / "b" / "out.partial"
    begin = time.monotonic()
    while not list(staging.glob("*.safetensors")) and time.monotonic() - begin < 300:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    run.send_signal(sent)
    _, err = run.communicate(timeout=300)
    assert not (tmp_path / "b" / "out").exists()
    assert staging.is_dir()
    if sent == signal.SIGKILL:
        assert run.returncode == -sent
    else:
        assert run.returncode == 128 + sent
        assert "Traceback" not in err
        assert f"stopped by {sent.name}" in err and "out.partial" in err
    monkeypatch.chdir(tmp_path / "b")
    assert smelt(*words).code == 0
    assert contents(tmp_path / "b" / "out") == contents(tmp_path / "a" / "out")


def test_a_folder_of_another_unfinished_run_is_refused(good, text, monkeypatch):
    def full(file: Path, tensors: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(sink, "write_shard", full)
        refused(compress(good, text), "No space left")
    refused(compress(good, text, "--keep", 0.75), "another unfinished compression")
