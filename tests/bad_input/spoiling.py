"""Ways to spoil a good checkpoint, and what is said of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from commands import QUICK, Outcome, contents, smelt

INDEX = "model.safetensors.index.json"


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
