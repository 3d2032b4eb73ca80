"""Tiny checkpoints of families, calibrated once per session; task files and models to ask."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asked import VOCABULARY, random_llama
from checkpoints import save
from commands import tokenizer
from material import Material
from smelt.evaluate import tasks
from smelt.evaluate.tasks import TASKS


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Material]:
    """`material("mixtral")`, made once per session."""
    made: dict[str, Material] = {}

    def get(family: str) -> Material:
        if family not in made:
            made[family] = Material(save(family, tmp_path_factory.mktemp(family)))
        return made[family]

    return get


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`write("blimp", rows)`: a task file in the folder that SMELT_DATA names."""
    monkeypatch.setenv("SMELT_DATA", str(tmp_path))

    def write(name: str, rows: Any, split: str | None = None) -> Path:
        folder = tmp_path / (TASKS[name].folder or name)
        path = folder / f"{split or TASKS[name].split}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return path

    return write


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer."""
    return tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama(128)


@pytest.fixture
def spelt() -> Any:
    """A tokenizer of six whole words, without a token for padding."""
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>")


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, float]]:
    """What was asked and answered: (question, answer, log-likelihood)."""
    harness = tasks.load_harness()
    found: list[tuple[str, str, float]] = []
    own = harness.Scorer.loglikelihood

    def loglikelihood(self: Any, requests: Any, **kwargs: Any) -> Any:
        answers = own(self, requests, **kwargs)
        found.extend((*r.args, a[0]) for r, a in zip(requests, answers, strict=True))
        return answers

    monkeypatch.setattr(harness.Scorer, "loglikelihood", loglikelihood)
    return found
