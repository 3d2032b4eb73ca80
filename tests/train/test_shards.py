"""Laws of the token cache: text is tokenised once, and anew when anything about it changes."""

import os

import numpy as np
import pytest

from smelt.errors import CalibrationError, RecipeError
from smelt.settings import check_recipe
from smelt.text import tokenize
from smelt.text.sources import TextSource
from smelt.train import shards
from smelt.train.settings import TextSettings, TokenizerSettings
from smelt.train.shards import find_tokenizer, shard
from smelt.train.stream import write_tokens


@pytest.fixture
def settings(text, tmp_path):
    """Text in a copy that a test may change, and a cache of its own."""
    for split in ("train", "held_out"):
        (tmp_path / f"{split}.txt").write_text((text / f"{split}.txt").read_text())
    values = {
        "train": [str(tmp_path / "train.txt")],
        "held_out": [str(tmp_path / "held_out.txt")],
        "tokens": 1000,
        "sequence_length": 32,
        "cache": str(tmp_path / "cache"),
    }
    return check_recipe(values, TextSettings)


@pytest.fixture
def made(monkeypatch):
    """How often text was tokenised and tokenizers were fitted."""
    calls = []
    for name in ("tokenize", "fit_tokenizer"):
        original = getattr(shards, name)

        def count(*arguments, _name=name, _original=original, **named):
            calls.append(_name)
            return _original(*arguments, **named)

        monkeypatch.setattr(shards, name, count)
    return calls


def draw(settings, tokens=1000):
    tokenizer = find_tokenizer(TokenizerSettings(vocab_size=300), settings, with_mask=False)
    return tokenizer, shard(settings.train, tokenizer, settings, tokens)


def test_a_shard_holds_what_tokenize_draws(settings):
    tokenizer, found = draw(settings)
    blocks = tokenize(settings.train, tokenizer, num_tokens=1000, sequence_length=32)
    assert found.sha256 == blocks.sha256
    assert found.blocks().input_ids.equal(blocks.input_ids)
    assert found.blocks().mask.equal(blocks.mask)
    assert (found.num_tokens, found.num_bytes) == (blocks.num_tokens, blocks.num_bytes)
    counts = found.counts(300)
    assert int(counts.sum()) == found.num_tokens
    assert counts[int(blocks.input_ids[0, 0])] > 0
    assert found.take([3, 1]).equal(blocks.input_ids[[3, 1]])


def test_the_same_text_is_tokenised_once(settings, made):
    first, again = draw(settings), draw(settings)
    assert made == ["fit_tokenizer", "tokenize"]
    assert first[1].sha256 == again[1].sha256
    assert first[0].get_vocab() == again[0].get_vocab()
    assert first[0].eos_token == again[0].eos_token


@pytest.mark.parametrize("changed", ["content", "sequence_length", "seed", "tokens"])
def test_other_text_or_settings_are_tokenised_anew(settings, made, changed):
    _, first = draw(settings)
    if changed == "content":
        path = settings.train[0].location
        stat = os.stat(path)  # noqa: PTH116
        with open(path, "r+") as file:  # noqa: PTH123
            file.write("two")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif changed != "tokens":
        settings = settings.model_copy(update={changed: 16})
    _, other = draw(settings, 900 if changed == "tokens" else 1000)
    assert made.count("tokenize") == 2
    assert other.sha256 != first.sha256


def test_a_shard_that_was_interrupted_is_made_anew(settings, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shards, "tokenize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(settings)
    assert not list((tmp_path / "cache").glob("tokens-*"))
    assert draw(settings)[1].num_tokens > 900


def test_a_cache_that_cannot_be_written_is_one_clear_error(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="text.cache or the environment variable SMELT_CACHE"):
        draw(settings.model_copy(update={"cache": str(tmp_path / "file")}))


def test_a_masked_model_needs_a_mask_token(settings, tmp_path):
    plain, _ = draw(settings)
    plain.save_pretrained(tmp_path / "plain")
    named = TokenizerSettings(folder=str(tmp_path / "plain"))
    with pytest.raises(RecipeError, match="no mask token"):
        find_tokenizer(named, settings, with_mask=True)
    fitted = find_tokenizer(TokenizerSettings(vocab_size=300), settings, with_mask=True)
    assert fitted.mask_token_id is not None
    assert plain.mask_token_id is None


# --- text that is streamed -----------------------------------------------------------------------


def streamed(settings, monkeypatch, **changes):
    monkeypatch.setattr(shards, "STREAMED_FROM", 100)
    return draw(settings.model_copy(update=changes))


def test_streamed_text_is_whole_documents_in_random_order(settings, monkeypatch):
    tokenizer, found = streamed(settings, monkeypatch)
    blocks = found.blocks()
    assert (found.num_tokens, tuple(blocks.input_ids.shape)) == (1000, (32, 32))
    assert int((~blocks.mask).sum()) == 24
    written = tokenizer.decode(blocks.input_ids[blocks.mask])
    with open(settings.train[0].location) as file:  # noqa: PTH123
        source = file.read()
    for document in written.split(tokenizer.eos_token):
        assert document in source
    _, again = streamed(settings, monkeypatch, cache=settings.cache + "2")
    _, other = streamed(settings, monkeypatch, seed=1)
    assert again.sha256 == found.sha256 != other.sha256
    assert abs(found.num_bytes - len(written.encode())) < 5000  # the last document is counted whole


def test_streamed_sources_are_mixed_by_weight_in_every_window(settings, tmp_path):
    sources = []
    for name, weight in (("aaaa", 3), ("bbbb", 1)):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 8000)
        sources.append(TextSource("files", str(tmp_path / f"{name}.txt"), weight))
    tokenizer, _ = draw(settings)
    a, b = (tokenizer(letter)["input_ids"][0] for letter in "ab")
    meta = write_tokens(
        tmp_path / "bin", sources, tokenizer, num_tokens=32_000, sequence_length=8, seed=0,
        window=16_000,
    )  # fmt: skip
    tokens = np.fromfile(tmp_path / "bin", meta["dtype"])
    for half in np.split(tokens, 2):
        share = (half == b).sum() / ((half == a).sum() + (half == b).sum())
        assert share == pytest.approx(0.25, abs=0.1)
    assert meta["num_tokens"] == 32_000


def test_a_streamed_source_that_ends_early_warns_and_the_others_go_on(settings, tmp_path):
    (tmp_path / "short.txt").write_text("six seven eight.\n")
    sources = [TextSource("files", str(tmp_path / "short.txt")), settings.train[0]]
    tokenizer, _ = draw(settings)
    with pytest.warns(UserWarning, match="short.txt: .* tokens found where 500 were asked"):
        meta = write_tokens(
            tmp_path / "bin",
            sources,
            tokenizer,
            num_tokens=1000,
            sequence_length=8,
            seed=0,
            window=100,
        )
    assert 500 <= meta["num_tokens"] <= 1000
    (tmp_path / "short.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="holds no text"):
        write_tokens(
            tmp_path / "bin", sources, tokenizer, num_tokens=1000, sequence_length=8, seed=0
        )
