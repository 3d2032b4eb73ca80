"""The command line as tests use it: one call, its exit code, what it printed, what it works on."""

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import save

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = (
    "The routers of a model send every token to a few of its experts.\n\n"
    "def merge(experts, weights):\n    return sum(w * e for w, e in zip(weights, experts))\n\n"
)
QUICK = ("--set", "calibration.sequence_length=32", "--tokens", "600", "--no-reconstruct")
"""A compression that takes a blink."""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def smelt(*words: object) -> Outcome:
    """Run a command in this process."""
    from smelt.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Outcome(code, out.getvalue(), err.getvalue())


@cache
def tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """A small byte-level tokenizer, fitted to TEXT."""
    from smelt.text.sources import parse_source
    from smelt.train.data import train_tokenizer

    return train_tokenizer(
        [parse_source(str(text_file(folder)))], vocab_size=300, num_sentinels=0, seed=0
    )


def text_file(folder: Path) -> Path:
    """Some text to calibrate on."""
    file = folder / "text.txt"
    if not file.exists():
        file.write_text("".join(f"{i}. {TEXT}" for i in range(200)))
    return file


def make_source(folder: Path, family: str = "qwen3_moe", **changes: Any) -> Path:
    """A tiny random checkpoint with a tokenizer."""
    save(family, folder, **{"vocab_size": 300, **changes})
    tokenizer(folder.parent).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder by its relative path, as a hash."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
