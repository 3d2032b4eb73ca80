"""llama.cpp cuts text into the tokens that transformers makes of it."""

import argparse
import json
import string
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the package gguf is missing: pip install 'smelt[gguf]'")

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from checkpoints import save
from llama import needs_llama
from smelt import api
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError
from smelt.export.engine import Engine
from smelt.export.tokens import SAMPLE, read_vocabulary

pytestmark = needs_llama

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def source_code() -> str:
    """Real text: two modules of the running Python."""
    return "".join(
        Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, string)
    )


def byte_level(pattern: str | None, vocab_size: int = 600, **special: Any) -> Tokenizer:
    """Byte pairs fitted to Python code, cut by GPT-2's pattern or another."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    made.pre_tokenizer = level
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    digits = " ".join(str(7919 * i) for i in range(3000))
    made.train_from_iterator([source_code() + SAMPLE, digits], trainer)
    return made


def with_tokenizer(folder: Path, made: Tokenizer, rows: int | None = None, **special: Any) -> Path:
    """A tiny checkpoint with this tokenizer."""
    save("mixtral", folder, vocab_size=rows or made.get_vocab_size())
    special = special or {"eos_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def cut_alike(folder: Path, path: Path, *texts: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Engine(path, context=16) as engine:
        for text in texts:
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert engine.tokenise(text) == expected
            assert len(expected) > 20


def test_the_embedded_tokenizer_cuts_real_text_alike(tmp_path):
    folder = Path(str(files("smelt") / "data" / "tiny-moe"))
    done = api.export_gguf(folder, tmp_path / "tiny.gguf")
    assert not any("cut" in note or "pre-tokenizer" in note for note in done.notes)
    cut_alike(folder, done.path, source_code(), SAMPLE)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(None, "gpt-2"), (QWEN2, "qwen2"), (LLAMA3, "llama-bpe")],
    ids=["gpt-2", "qwen2", "llama-bpe"],
)
def test_a_pre_tokenizer_is_named_by_what_it_does(pattern, name, tmp_path):
    folder = with_tokenizer(tmp_path / "model", byte_level(pattern))
    assert read_vocabulary(Checkpoint.open(folder)).pre == name
    done = api.export_gguf(folder, tmp_path / "model.gguf")
    assert not done.notes
    cut_alike(folder, done.path, source_code(), SAMPLE)


def test_a_pre_tokenizer_that_llama_cpp_does_not_know_is_said(tmp_path):
    folder = with_tokenizer(tmp_path / "model", byte_level(r"[aeiou]+|[^aeiou]+"))
    found = read_vocabulary(Checkpoint.open(folder))
    assert found.pre == "default"
    assert any("none of llama.cpp's pre-tokenizers" in note for note in found.notes)


def test_pieces_with_bytes_to_fall_back_on_are_cut_alike(tmp_path):
    # As Mixtral's: a blank is a mark, one stands before the text, and unknown letters are bytes.
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [*string.ascii_letters, *string.digits, *"▁.,:;()[]{}='\"_-+*/<>#%&!?@\\|~^$`"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=specials,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    made.train_from_iterator(source_code().split("\n"), trainer)
    settings = json.loads(made.to_str())
    for token in settings["added_tokens"][3:]:  # bytes are no special tokens
        settings["added_tokens"].remove(token)
    made = Tokenizer.from_str(json.dumps(settings))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = with_tokenizer(tmp_path / "model", made, **special)
    done = api.export_gguf(folder, tmp_path / "model.gguf")
    assert not done.notes, done.notes
    cut_alike(folder, done.path, SAMPLE, source_code()[:5000])


def test_special_tokens_keep_their_ids_and_kinds(tmp_path):
    import gguf

    folder = with_tokenizer(tmp_path / "model", byte_level(None), rows=640)
    path = api.export_gguf(folder, tmp_path / "model.gguf").path
    reader = gguf.GGUFReader(path)

    def get(key: str) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{key}")
        return None if field is None else field.contents()

    assert get("eos_token_id") == 0
    assert get("token_type")[0] == gguf.TokenType.CONTROL
    assert get("tokens")[639] == "[PAD639]"
    assert get("token_type")[639] == gguf.TokenType.UNUSED
    with Engine(path, context=16) as engine:
        assert engine.tokenise("a<|end|>", special=True)[-1] == 0
        assert 0 not in engine.tokenise("a<|end|>")


def test_a_normalizer_is_said_to_be_left_out(tmp_path):
    made = byte_level(None)
    made.normalizer = normalizers.NFC()
    done = api.export_gguf(with_tokenizer(tmp_path / "model", made), tmp_path / "model.gguf")
    assert any("normalizer (NFC)" in note for note in done.notes)


def test_more_tokens_than_rows_are_refused(tmp_path):
    folder = with_tokenizer(tmp_path / "model", byte_level(None), rows=300)
    with pytest.raises(CheckpointError, match="600 tokens, the model 300"):
        api.export_gguf(folder, tmp_path / "model.gguf")


def test_a_kind_without_a_place_in_gguf_is_refused(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    folder = with_tokenizer(tmp_path / "model", made, eos_token="b")
    with pytest.raises(CheckpointError, match="kind WordLevel"):
        api.export_gguf(folder, tmp_path / "model.gguf")


def test_without_a_tokenizer_token_ids_still_run(tmp_path):
    done = api.export_gguf(save("mixtral", tmp_path / "model"), tmp_path / "model.gguf")
    assert any("no tokenizer" in note for note in done.notes)
    with Engine(done.path, context=16) as engine:
        assert len(engine.greedy([3, 4, 5], 4)) == 4
