"""Task files, and a tokenizer that was fitted to their words."""

import pytest
from tokenizers import Tokenizer

from benchmarks import write_tasks
from smelt.text import parse_source
from smelt.train.data import train_tokenizer


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The eight tasks, small."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Byte-level, with sentinels."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("the house is painted red, question: answer: context: sentence: yes no\n" * 40)
    return train_tokenizer([parse_source(str(path))], vocab_size=420, num_sentinels=8)


@pytest.fixture(scope="session")
def plain_tokenizer(tokenizer, tmp_path_factory):
    """The same without sentinels."""
    path = tmp_path_factory.mktemp("plain") / "words.txt"
    path.write_text("the house is painted red\n" * 40)
    fitted = train_tokenizer([parse_source(str(path))], vocab_size=300)
    assert isinstance(fitted.backend_tokenizer, Tokenizer)
    return fitted
