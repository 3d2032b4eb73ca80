"""Laws of the text sources: what is read, how it is mixed, what is refused."""

import gzip
import json
import warnings
from itertools import chain

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smelt.errors import CalibrationError, RecipeError
from smelt.text import TextSource, as_source, library, parse_source, read_documents, tokenize
from smelt.text.sources import draw_documents


def byte_tokenizer(**special):
    """One token per byte: what the tokens of a text are can be said by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<eos>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>"} | special)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def real_tokens(blocks):
    return blocks.input_ids[blocks.mask]


def text_of(blocks, tokenizer):
    return tokenizer.decode(real_tokens(blocks), skip_special_tokens=True)


@pytest.fixture
def corpus(tmp_path):
    """A folder of small files, each of one letter, so that what was drawn can be seen."""
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{chr(ord('a') + i % 26)}" * 100 + "\n")
    return parse_source(f"{tmp_path}/")


# --- what a word means ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "source"),
    [
        ("python", TextSource("python")),
        ("python:held-out", TextSource("python", split="held-out")),
        ("python:code", TextSource("python", part="code")),
        ("python:held-out:prose", TextSource("python", split="held-out", part="prose")),
        ("python:all=0.3", TextSource("python", split="all", weight=0.3)),
        ("notes.txt", TextSource("files", "notes.txt")),
        ("deep/notes.txt", TextSource("files", "deep/notes.txt")),
        ("dir/", TextSource("files", "dir/")),
        ("dir/**/*.md", TextSource("files", "dir/**/*.md")),
        ("${HOME}/x", TextSource("files", "${HOME}/x")),
        ("a.jsonl", TextSource("jsonl", "a.jsonl")),
        ("d/a.jsonl.gz=2", TextSource("jsonl", "d/a.jsonl.gz", weight=2.0)),
        ("allenai/c4:en:train", TextSource("dataset", "allenai/c4:en:train")),
        ("allenai/c4", TextSource("dataset", "allenai/c4")),
    ],
)
def test_a_word_names_one_source_and_reads_back(word, source):
    assert parse_source(word) == source
    assert parse_source(f"{source}={source.weight}") == source


def test_a_folder_that_exists_is_never_taken_for_a_dataset(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("owner/name").kind == "files"


def test_a_mapping_and_a_word_name_the_same_source():
    mapping = {"kind": "python", "split": "held-out", "part": "code", "weight": 0.5}
    assert as_source(mapping) == as_source("python:held-out:code=0.5")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "empty text source"),
        ("python:heldout", "held-out"),
        ("python:code:prose", "prose"),
        ({"kind": "python", "splitt": "all"}, "kind, location, weight, field, split, part"),
        ({"location": "a.txt"}, "'kind' is missing"),
        ({"kind": "files", "location": "a", "weight": 0}, "positive"),
        ({"kind": "file", "location": "a"}, "files, jsonl, dataset, python"),
    ],
)
def test_a_source_that_cannot_be_says_what_can(value, message):
    with pytest.raises(CalibrationError, match=message):
        as_source(value)


# --- reading -------------------------------------------------------------------------------------


def test_drawing_a_long_file_yields_each_of_its_bytes_once(tmp_path):
    text = "".join(f"paragraph {i} ä€𝄞\n" + "\n" * (i % 3 == 0) for i in range(9000))
    (tmp_path / "long.txt").write_text(text)
    source = parse_source(f"{tmp_path}/long.txt")
    pieces = list(draw_documents(source, torch.Generator().manual_seed(0), 4096))
    assert len(pieces) > 20
    assert pieces != sorted(pieces, key=text.find)
    assert "".join(sorted(pieces, key=text.find)) == text
    assert "".join(read_documents(source)) == text


def test_a_long_line_is_cut_between_characters(tmp_path):
    text = "x" + "𝄞" * 20_000
    (tmp_path / "line.txt").write_text(text)
    source = parse_source(f"{tmp_path}/line.txt")
    pieces = list(draw_documents(source, torch.Generator().manual_seed(1), 4096))
    assert sum(map(len, pieces)) == len(text)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_drawing_jsonl_yields_each_row_once(tmp_path, suffix):
    rows = [f"row {i} " + "y" * (i % 700) for i in range(500)]
    lines = "\n".join(json.dumps({"text": row}) for row in rows).encode()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(lines, mtime=0) if suffix.endswith("gz") else lines)
    source = parse_source(str(path))
    drawn = list(draw_documents(source, torch.Generator().manual_seed(0), 4096))
    assert drawn != rows
    assert sorted(drawn) == sorted(rows)
    assert list(read_documents(source)) == rows


def test_a_folder_is_its_text_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("two")
    (tmp_path / "1.md").write_text("one")
    (tmp_path / "3.txt.gz").write_bytes(gzip.compress(b"three", mtime=0))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\0\0")
    (tmp_path / ".hidden").write_text("no")
    assert list(read_documents(parse_source(f"{tmp_path}/"))) == ["one", "three", "two"]
    assert list(read_documents(parse_source(f"{tmp_path}/**/*.txt"))) == ["two"]


def test_only_what_is_drawn_is_read(tmp_path, tokenizer, monkeypatch):
    from smelt.text import pieces

    (tmp_path / "big.txt").write_text("some words in a line\n" * 200_000)
    read, decode = [], pieces._decode
    monkeypatch.setattr(
        pieces, "_decode", lambda data, path: read.append(data) or decode(data, path)
    )
    tokenize([parse_source(f"{tmp_path}/big.txt")], tokenizer, num_tokens=5000, sequence_length=64)
    assert sum(map(len, read)) < 200_000


# --- mixing and packing --------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.7), (5.0, 1.0)])
def test_sources_give_their_weight_of_the_tokens(tmp_path, tokenizer, weights):
    sources = []
    for letter, weight in zip("ab", weights, strict=True):
        (tmp_path / f"{letter}.txt").write_text((letter * 99 + "\n") * 4000)
        sources.append(parse_source(f"{tmp_path}/{letter}.txt={weight}"))
    blocks = tokenize(sources, tokenizer, num_tokens=400_000, sequence_length=128)
    text = text_of(blocks, tokenizer)
    assert text.count("a") / len(text.replace("\n", "")) == pytest.approx(
        weights[0] / sum(weights), abs=0.005
    )
    # and really mixed: each quarter of the sequences holds its share too, give or take
    for quarter in blocks.input_ids.chunk(4):
        letters = tokenizer.decode(quarter.flatten())
        share = letters.count("a") / (letters.count("a") + letters.count("b"))
        assert share == pytest.approx(weights[0] / sum(weights), abs=0.3)
        assert 0 < share < 1


def test_one_seed_gives_one_text_and_another_seed_another(corpus, tokenizer):
    def draw(seed):
        return tokenize([corpus], tokenizer, num_tokens=1000, sequence_length=64, seed=seed)

    assert draw(0).sha256 == draw(0).sha256
    assert len({draw(seed).sha256 for seed in range(5)}) == 5
    # other documents, not the same ones in another order
    assert set(text_of(draw(0), tokenizer)) != set(text_of(draw(1), tokenizer))


def test_the_hash_binds_ids_and_mask(corpus, tokenizer):
    blocks = tokenize([corpus], tokenizer, num_tokens=1000, sequence_length=64)
    longer = tokenize([corpus], tokenizer, num_tokens=1001, sequence_length=64)
    reshaped = tokenize([corpus], tokenizer, num_tokens=1000, sequence_length=32)
    assert len({blocks.sha256, longer.sha256, reshaped.sha256}) == 3


def test_asked_tokens_are_given_and_padding_is_masked(corpus, tokenizer):
    blocks = tokenize([corpus], tokenizer, num_tokens=1000, sequence_length=64)
    assert blocks.num_tokens == 1000
    assert blocks.input_ids.shape == (16, 64)
    assert blocks.mask.flatten().tolist() == [True] * 1000 + [False] * 24


def test_documents_are_divided_by_the_end_token(tmp_path, tokenizer):
    for name in "xyz":
        (tmp_path / f"{name}.txt").write_text(name * 5)
    with pytest.warns(UserWarning, match="18 tokens found where 100"):
        blocks = tokenize(
            [parse_source(f"{tmp_path}/")], tokenizer, num_tokens=100, sequence_length=50
        )
    assert blocks.num_tokens == 3 * (5 + 1)
    documents = tokenizer.decode(real_tokens(blocks)).split("<eos>")
    assert sorted(documents) == ["", "xxxxx", "yyyyy", "zzzzz"]


def test_a_tokenizer_with_its_own_special_tokens_keeps_them(tmp_path):
    from tokenizers.processors import TemplateProcessing

    own = byte_tokenizer()
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 256)]
    )
    (tmp_path / "a.txt").write_text("abc")
    source = parse_source(f"{tmp_path}/a.txt")
    blocks = tokenize([source], own, num_tokens=5, sequence_length=5)
    assert own.decode(blocks.input_ids[0]) == "<eos>abc<eos>"
    assert blocks.num_bytes == 3


@pytest.mark.parametrize("num_tokens", [4, 7, 50, 333, 1000])
def test_bytes_are_those_of_the_real_tokens_text(tmp_path, tokenizer, num_tokens):
    (tmp_path / "a.txt").write_text("ä€𝄞 plain " * 300)
    source = parse_source(f"{tmp_path}/a.txt")
    blocks = tokenize([source], tokenizer, num_tokens=num_tokens, sequence_length=32)
    text = text_of(blocks, tokenizer)
    assert "\N{REPLACEMENT CHARACTER}" not in text  # no character is cut
    assert blocks.num_bytes == len(text.encode())
    assert num_tokens - 3 <= blocks.num_tokens <= num_tokens


def test_batches_hold_every_sequence_in_order(corpus, tokenizer):
    blocks = tokenize([corpus], tokenizer, num_tokens=1000, sequence_length=64)
    batches = blocks.batches(5)
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 5, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), blocks.input_ids)
    assert torch.equal(torch.cat([b["attention_mask"] for b in batches]).bool(), blocks.mask)


# --- chats ---------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def test_messages_are_rendered_by_the_chat_template_only_when_asked(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    source = parse_source(f"{tmp_path}/a.jsonl")
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    plain = tokenize([source], tokenizer, num_tokens=6, sequence_length=64)
    assert text_of(plain, tokenizer) == "hi\n\nho"
    asked = tokenize([source], tokenizer, num_tokens=21, sequence_length=64, chat_template=True)
    assert text_of(asked, tokenizer) == "[user]hi[assistant]ho"


def test_a_chat_template_that_is_not_there_is_one_error(corpus, tokenizer):
    with pytest.raises(CalibrationError, match="tokenizer has none"):
        tokenize([corpus], tokenizer, num_tokens=10, sequence_length=8, chat_template=True)


# --- the embedded default ------------------------------------------------------------------------


def test_held_out_and_train_share_no_file_and_make_up_all():
    names = [name for name, _ in library.library_files()]
    held_out = {name for name in names if library.is_held_out(name)}
    assert 0.04 < len(held_out) / len(names) < 0.16
    code = {
        split: list(read_documents(TextSource("python", split=split, part="code")))
        for split in ("train", "held-out", "all")
    }
    assert sorted(code["train"] + code["held-out"]) == sorted(code["all"])
    assert not set(code["train"]) & set(code["held-out"]) - {""}


def test_the_held_out_rule_is_fixed():
    # By name alone, so that every Python and platform holds the same files out.
    names = ("json/__init__.py", "inspect.py", "os.py", "topics/truth", "topics/if")
    assert [library.is_held_out(name) for name in names] == [True, True, False, True, False]


def test_the_library_is_source_without_tests_tables_or_other_peoples_packages():
    names = [name for name, _ in library.library_files()]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    folders = set(chain.from_iterable(name.split("/")[:-1] for name in names))
    assert not folders & {"site-packages", "test", "tests", "encodings", "pydoc_data"}


def test_prose_is_no_code():
    prose = "".join(read_documents(TextSource("python", split="held-out", part="prose")))
    assert len(prose) > 20_000
    assert prose.count("def ") < len(prose) / 2000


# --- bad input: one clear error ------------------------------------------------------------------


def refused(source, tokenizer, message, error=CalibrationError):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=message):
            tokenize([source], tokenizer, num_tokens=100, sequence_length=10)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("binary.txt", b"ab\0cd", "not text .*NUL"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "0xe9 is not UTF-8"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n \n", "holds no text"),
        ("broken.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:30], "cannot be decompressed"),
        ("no.txt.gz", b"not gzip", "cannot be decompressed"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y", "n": 1}', "line 2: .*'text'.*txt, n"),
        ("b.jsonl", b'{"text": "x"}\n\n{"text": ', "line 3: not JSON"),
        ("c.jsonl", b'{"text": 3}', "line 1: "),
        ("d.jsonl", b"[1]", "line 1: not an object"),
        ("e.jsonl.gz", gzip.compress(b'{"text": "x"}\n{}', mtime=0), "line 2: "),
        ("f.jsonl", b"", "holds no text"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(parse_source(str(tmp_path / name)), tokenizer, message)


def test_the_line_named_is_the_line_of_the_file(tmp_path, tokenizer):
    rows = [json.dumps({"text": "x" * 300})] * 200
    rows[150] = '{"body": "y"}'
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(CalibrationError, match="line 151: "):
        list(read_documents(parse_source(f"{tmp_path}/a.jsonl")))
    with pytest.raises(CalibrationError, match="line 151: "):
        tokenize(
            [parse_source(f"{tmp_path}/a.jsonl")], tokenizer, num_tokens=10**6, sequence_length=64
        )


def test_a_place_without_text_is_one_clear_error(tmp_path, tokenizer, monkeypatch):
    refused(parse_source(f"{tmp_path}/none.txt"), tokenizer, "no such text")
    refused(parse_source(f"{tmp_path}/"), tokenizer, "holds no text file")
    refused(parse_source(f"{tmp_path}/*.txt"), tokenizer, "holds no text file")
    monkeypatch.delenv("SMELT_NOWHERE", raising=False)
    unset = parse_source("${SMELT_NOWHERE}/a.txt")
    refused(unset, tokenizer, "SMELT_NOWHERE, which is not set", RecipeError)


def test_a_data_set_out_of_reach_is_one_clear_error(tokenizer):
    refused(
        parse_source("nobody/nothing-at-all"), tokenizer, "nobody/nothing-at-all.*cannot be read"
    )


def test_text_without_a_tokenizer_is_one_clear_error(corpus):
    refused(corpus, None, "without a tokenizer")


def test_fewer_tokens_than_asked_warn_with_the_number(corpus, tokenizer):
    with pytest.warns(UserWarning, match="4,080 tokens found where 10,000"):
        blocks = tokenize([corpus], tokenizer, num_tokens=10_000, sequence_length=64)
    assert blocks.num_tokens == 40 * 102


# --- real text -----------------------------------------------------------------------------------


@pytest.mark.data
def test_a_real_corpus_comes_back_whole(smelt_data, tokenizer):
    path = smelt_data / "wikitext2_raw" / "validation.txt"
    assert "".join(read_documents(parse_source(str(path)))) == path.read_text(encoding="utf-8")
    blocks = tokenize([parse_source(str(path))], tokenizer, num_tokens=20_000, sequence_length=256)
    assert blocks.num_bytes == len(text_of(blocks, tokenizer).encode())
