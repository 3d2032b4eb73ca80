"""A tiny checkpoint with a tokenizer and its statistics, once per session."""

from pathlib import Path

import pytest

from commands import make_source, smelt, text_file


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, `text.txt`, and `stats` of the one on the other."""
    folder = tmp_path_factory.mktemp("ground")
    make_source(folder / "source")
    words = ("--set", "sequence_length=32", "--tokens", 1200, "--text", text_file(folder))
    done = smelt("calibrate", folder / "source", folder / "stats", *words)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def source(ground: Path) -> Path:
    return ground / "source"


@pytest.fixture
def stats(ground: Path) -> Path:
    return ground / "stats"


@pytest.fixture
def text(ground: Path) -> Path:
    return ground / "text.txt"
