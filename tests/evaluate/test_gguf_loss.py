"""A GGUF file is measured on exactly the tokens of its source, and beside it in one table."""

import math
from importlib.resources import files
from pathlib import Path

import pytest

from checkpoints import save
from commands import make_source, smelt, text_file
from llama import needs_llama
from smelt import api
from smelt.evaluate import results

pytestmark = needs_llama


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A checkpoint, its float32 and 8-bit files, and a text."""
    folder = tmp_path_factory.mktemp("gguf")
    make_source(folder / "model", hidden_size=64, head_dim=32, moe_intermediate_size=64)
    api.export_gguf(folder / "model", folder / "f32.gguf", dtype="float32")
    api.export_gguf(folder / "model", folder / "q8.gguf", quantise="Q8_0")
    text_file(folder)
    return folder


def evaluate(ground: Path, *paths: object, **settings):
    text = {"text": (str(text_file(ground)),), "num_tokens": 700, "sequence_length": 64}
    return api.evaluate([str(path) for path in paths], **{**text, **settings})


def test_llama_cpp_and_transformers_measure_the_same_loss(ground):
    found = evaluate(ground, ground / "model", ground / "f32.gguf")
    source, file = found.compared
    assert file.perplexity.perplexity == pytest.approx(source.perplexity.perplexity, rel=1e-5)
    assert file.perplexity.bits_per_byte == pytest.approx(source.perplexity.bits_per_byte, rel=1e-5)
    assert file.perplexity.num_tokens == source.perplexity.num_tokens
    # The text ends inside a sequence, so that the last one is padded.
    assert file.perplexity.num_tokens % 63 != 0
    for mine, its in zip(
        file.perplexity.sequences.total, source.perplexity.sequences.total, strict=True
    ):
        assert mine == pytest.approx(float(its), rel=1e-4)


def test_of_the_embedded_checkpoint_too(tmp_path):
    # A trained one, in bfloat16, its first layer dense: transformers computes in bfloat16.
    folder = Path(str(files("smelt") / "data" / "tiny-moe"))
    path = api.export_gguf(folder, tmp_path / "tiny.gguf", dtype="float32").path
    source, file = api.evaluate([folder, path], num_tokens=2048).compared
    assert file.perplexity.perplexity == pytest.approx(source.perplexity.perplexity, rel=1e-3)


def test_records_name_the_file_its_type_and_its_bytes(ground, tmp_path):
    found = evaluate(ground, ground / "model", ground / "q8.gguf")
    mine = [one for one in found.results if one.checkpoint == "q8.gguf"]
    by = {(one.task, one.metric): one for one in mine}
    assert by["size", "bytes on disk"].value == (ground / "q8.gguf").stat().st_size
    assert {one.dtype for one in mine} == {"Q8_0"}
    assert len({one.fingerprint for one in mine}) == 1 and len(mine[0].fingerprint) == 64
    assert all("xllamacpp" in one.versions for one in mine)
    theirs = {one.metric: one for one in found.results if one.checkpoint == "model"}
    perplexity = by["perplexity", "perplexity"]
    assert perplexity.text_sha256 == theirs["perplexity"].text_sha256
    assert perplexity.n == theirs["perplexity"].n
    assert perplexity.value != theirs["perplexity"].value
    results.save(found.results, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == found.results


def test_the_command_shows_files_beside_their_source(ground, tmp_path):
    done = smelt(
        *("evaluate", ground / "model", ground / "f32.gguf", ground / "q8.gguf"),
        *("--text", text_file(ground), "--tokens", 600, "--set", "sequence_length=64"),
        *("-o", tmp_path / "results.json"),
    )
    assert done.code == 0, done.err
    assert "| model" in done.out and "f32.gguf" in done.out and "q8.gguf" in done.out
    saved = results.load(tmp_path / "results.json")
    assert {one.checkpoint for one in saved} == {"model", "f32.gguf", "q8.gguf"}


def test_the_difference_to_the_source_is_paired(ground):
    source, file = evaluate(ground, ground / "model", ground / "q8.gguf").compared
    assert file.difference is not None
    expected = file.perplexity.nats - source.perplexity.nats
    assert file.difference.mean == pytest.approx(expected, abs=1e-9)
    assert file.difference.standard_error < file.perplexity.standard_error / 5


def refused(*words: object, says: str) -> None:
    done = smelt("evaluate", *words)
    lines = [line for line in done.err.splitlines() if line.startswith("smelt: error: ")]
    assert done.code == 2 and len(lines) == 1 and "Traceback" not in done.err, done.err
    assert says in lines[0], lines[0]


def test_a_file_without_its_source_is_refused(ground):
    refused(ground / "q8.gguf", says="checkpoint that it was made from")


def test_a_file_of_other_tokens_is_refused(ground, tmp_path):
    save("qwen3_moe", tmp_path / "other", vocab_size=310)
    for file in (ground / "model").glob("tokenizer*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    other = api.export_gguf(tmp_path / "other", tmp_path / "other.gguf").path
    refused(ground / "model", other, says="its tokens are not those of model")


def test_tasks_of_a_file_are_refused(ground):
    refused(ground / "model", ground / "q8.gguf", "--tasks", "blimp", says="transformers runs")


def test_a_file_that_is_none_is_refused(ground, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    refused(ground / "model", tmp_path / "bad.gguf", says="not a readable GGUF file")
    refused(ground / "model", tmp_path / "none.gguf", says="no such file")


def test_sequences_beyond_its_positions_are_refused(ground):
    with pytest.raises(Exception, match="128 positions"):
        evaluate(ground, ground / "model", ground / "q8.gguf", sequence_length=160)


def test_without_llama_cpp_the_message_says_what_to_install(ground, monkeypatch):
    import importlib.util

    from smelt.export import engine

    find = importlib.util.find_spec
    engine.library.cache_clear()
    monkeypatch.setattr(
        engine.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name)
    )
    refused(ground / "model", ground / "q8.gguf", says="pip install 'smelt[gguf]'")
    engine.library.cache_clear()


def test_perplexity_is_that_of_the_mean_loss(ground):
    (_, file) = evaluate(ground, ground / "model", ground / "q8.gguf").compared
    assert file.perplexity.perplexity == pytest.approx(math.exp(file.perplexity.nats))
