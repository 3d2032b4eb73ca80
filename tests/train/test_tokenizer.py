"""Laws of a fitted tokenizer: every text comes back, and every process fits the same."""

import hashlib
import subprocess
import sys

from transformers import AutoTokenizer

from smelt.text import parse_source
from smelt.train.data import train_tokenizer


def test_a_fitted_tokenizer_gives_every_text_back(text, tmp_path):
    tokenizer = train_tokenizer([parse_source(str(text / "train.txt"))], vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for sample in ("one two three.\n", "  def f(x):\n\treturn '𝄞 ä'\n", "\0\x7f"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
        assert loaded(sample)["input_ids"] == tokenizer(sample)["input_ids"]
    assert loaded.eos_token == "<|endoftext|>"
    assert len(tokenizer) <= 300


def test_a_tokenizer_is_fitted_the_same_in_another_process(text):
    code = (
        "import sys, hashlib; from smelt.text import parse_source;"
        "from smelt.train.data import train_tokenizer;"
        "t = train_tokenizer([parse_source(sys.argv[1])], vocab_size=320);"
        "sys.stdout.write(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code, str(text / "train.txt")]
    there = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    here = train_tokenizer([parse_source(str(text / "train.txt"))], vocab_size=320)
    assert there == hashlib.sha256(here.backend_tokenizer.to_str().encode()).hexdigest()
