"""Laws of opening: where a checkpoint may lie, and that two of them are told apart."""

import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from checkpoints import save
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("mixtral", tmp_path_factory.mktemp("mixtral"))


def test_a_hub_id_opens_the_snapshot_in_the_cache_without_a_network(folder, tmp_path, monkeypatch):
    repository = tmp_path / "models--lab--tiny"
    commit = "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    opened = Checkpoint.open("lab/tiny")
    assert opened.fingerprint == Checkpoint.open(folder).fingerprint
    assert torch.equal(
        opened.read("lm_head.weight"), Checkpoint.open(folder).read("lm_head.weight")
    )


def test_a_hub_id_that_cannot_be_had_is_one_clear_error():
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        Checkpoint.open("lab/absent")


def test_the_fingerprint_is_of_the_contents_not_of_the_place_or_the_shards(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert Checkpoint.open(copy).fingerprint == Checkpoint.open(folder).fingerprint


def test_another_seed_or_configuration_has_another_fingerprint(folder, tmp_path):
    prints = {Checkpoint.open(folder).fingerprint}
    prints.add(Checkpoint.open(save("mixtral", tmp_path / "seed", seed=1)).fingerprint)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    file = changed / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, file, {"format": "pt"})
    prints.add(Checkpoint.open(changed).fingerprint)
    assert len(prints) == 3
