"""A good checkpoint to be spoilt, and text to go with it."""

import shutil
from pathlib import Path

import pytest

from commands import make_source, smelt, text_file

QUICK_TEXT = ("--set", "sequence_length=32", "--tokens", "600")


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


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint that differs in its weights only."""
    return make_source(tmp_path / "other", seed=1)
