"""A tokenizer as GGUF keeps it, and which of llama.cpp's pre-tokenizers cuts text as it does.

llama.cpp knows how a text is cut before byte pairs are merged by a name only. The name is chosen
by what it does: a small file with each likely name is loaded, and its tokens of a sample text are
held against the tokenizer's own.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError
from smelt.export.engine import Engine, missing

_NORMAL, _CONTROL, _USER, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # gguf's TokenType
_UNKNOWN = 2
_SPACE = "▁"

_SAMPLED = 4096
"""Tokens whose texts are part of what is cut to choose a pre-tokenizer."""

PRE_TOKENIZERS = (
    "gpt-2",
    "qwen2",
    "llama-bpe",
    "olmo",
    "deepseek-v3",
    "deepseek-llm",
    "deepseek-coder",
    "gpt-4o",
    "glm4",
    "starcoder",
    "smollm",
    "refact",
    "tekken",
    "dbrx",
    "falcon",
    "mpt",
    "stablelm2",
    "command-r",
    "default",
)
"""llama.cpp's names that are tried, the commonest first."""

SAMPLE = (
    "The quick brown fox can't jump; they'll, we've, I'd, it's — \"quoted\" text.\n\n"
    "def main(argv: list[str]) -> int:\n    x = {'a': 1, \"b\": [2.5, -3e10]}\n"
    "\tif x != None and not (y_z <= 0x1F):\n        return 12345678 % 99 # why?\n\n\n"
    "   three spaces,  two  ,trailing   \n\t\tTabs\tand\r\nwindows lines\r\n"
    "Größe, naïve café, ÆØÅ, Ελλάδα, Россия, 東京タワー, 안녕하세요, שלום, ١٢٣ 42% $3.50 №7\n"
    "CamelCaseWords HTTPServer2Go snake_case __init__ a.b.c http://example.org/?q=1&r=2#top\n"
    "!!! ... --- *** ((())) [[]] {{}} <<>> @user #tag ~/path/to/file.txt 🙂🙃👩‍💻 ½ ² ™\n"
    "1 22 333 4444 55555 666666 1,234,567.89 2024-02-29T12:00:00Z 'S 'LL 'Re DON'T\n"
)
"""A text on which pre-tokenizers differ: contractions, digits, blanks, letters of many scripts."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model and what GGUF says of them."""

    model: str  # "gpt2": bytes and merges; "llama": pieces and scores; "no_vocab"
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    pre: str = "default"
    specials: tuple[tuple[str, int], ...] = ()  # "bos", "eos", "unk", "padding"
    add_bos: bool = False
    add_eos: bool = False
    add_space: bool = False
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        if not self.tokens:
            return
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.scores:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.add_space)
        for name, number in self.specials:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """The tokenizer beside the weights; "no_vocab" where there is none.

    Raises:
        CheckpointError: a kind that GGUF has no place for, or more tokens than the model has rows.
    """
    try:
        tokenizer = checkpoint.tokenizer
    except CheckpointError:
        note = "no tokenizer lies beside the weights: the file has none, and takes token ids only"
        return Vocabulary("no_vocab", notes=(note,))
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{checkpoint.folder}: {type(tokenizer).__name__} has no tokenizer.json. Save it as a "
            "fast tokenizer."
        )
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    rows = checkpoint.config.get_text_config().vocab_size
    tokens, types = _tokens(parsed, tokenizer, rows)
    if len(tokens) > rows:
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer has {len(tokens)} tokens, the model {rows}."
        )
    found = _common(tokenizer, tuple(tokens), tuple(types))
    if _is_byte_level(parsed):
        merges = tuple(_pair(merge) for merge in parsed["model"]["merges"])
        return _choose_pre(replace(found, model="gpt2", merges=merges), tokenizer, parsed)
    if parsed["model"]["type"] == "BPE" and parsed["model"].get("byte_fallback"):
        return _check(_pieces(found, parsed), tokenizer, parsed)
    raise CheckpointError(
        f"{checkpoint.folder}: a tokenizer of kind {parsed['model']['type']} is neither byte-level "
        "byte pairs nor pieces with bytes to fall back on, the two that smelt writes as GGUF."
    )


def token_list(tokenizer: Any, rows: int) -> list[str]:
    """The tokens of a fast tokenizer as a GGUF file lists them, filled up to the model's rows."""
    return _tokens(json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer, rows)[0]


def _tokens(parsed: dict[str, Any], tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """Every token's text and type by its id."""
    vocabulary = tokenizer.get_vocab()
    count = max(rows, 1 + max(vocabulary.values(), default=-1))
    tokens = [f"[PAD{i}]" for i in range(count)]
    types = [_UNUSED] * count
    for text, number in vocabulary.items():
        tokens[number], types[number] = text, _NORMAL
    unknown = parsed["model"].get("unk_token")
    if parsed["model"].get("byte_fallback"):
        for byte in range(256):
            if (number := vocabulary.get(f"<0x{byte:02X}>")) is not None:
                types[number] = _BYTE
    for added in parsed.get("added_tokens", []):
        types[added["id"]] = _CONTROL if added["special"] else _USER
        if added["content"] == unknown:
            types[added["id"]] = _UNKNOWN
    return tokens, types


def _common(tokenizer: Any, tokens: tuple[str, ...], types: tuple[int, ...]) -> Vocabulary:
    """What both kinds have: special tokens, and what is put around a text."""
    named = {"bos": "bos", "eos": "eos", "unk": "unk", "padding": "pad"}
    specials = [
        (key, number)
        for key, name in named.items()
        if isinstance(number := getattr(tokenizer, f"{name}_token_id", None), int)
    ]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        model="",
        tokens=tokens,
        types=types,
        specials=tuple(specials),
        add_bos=whole[:at] == [tokenizer.bos_token_id] and at == 1,
        add_eos=whole[at + len(plain) :] == [tokenizer.eos_token_id],
        chat_template=template if isinstance(template, str) else None,
    )


def _pair(merge: str | Sequence[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, out of a sequence or alone."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [step for one in inner for step in _steps(one)] if inner else [part]


def _is_byte_level(parsed: dict[str, Any]) -> bool:
    kinds = [step["type"] for step in _steps(parsed.get("pre_tokenizer"))]
    return parsed["model"]["type"] == "BPE" and "ByteLevel" in kinds


def _pieces(found: Vocabulary, parsed: dict[str, Any]) -> Vocabulary:
    """SentencePiece-like byte pairs: llama.cpp merges by score, so that a rank becomes one."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(parsed["model"]["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(first + second, rank)
    lowest = -float(len(ranks) + 1)
    scores = tuple(-float(ranks[t]) if t in ranks else lowest for t in found.tokens)
    prepends = any(s["type"] == "Prepend" for s in _steps(parsed.get("normalizer"))) or any(
        s["type"] == "Metaspace" and s.get("prepend_scheme", "always") != "never"
        for s in _steps(parsed.get("pre_tokenizer"))
    )
    return replace(found, model="llama", scores=scores, add_space=prepends)


def _choose_pre(found: Vocabulary, tokenizer: Any, parsed: dict[str, Any]) -> Vocabulary:
    """The vocabulary with the first name under which llama.cpp cuts the sample alike."""
    notes = _normalizer_notes(parsed)
    if (reason := missing()) is not None:
        plain = [step["type"] for step in _steps(parsed.get("pre_tokenizer"))] == ["ByteLevel"]
        name = "gpt-2" if plain else "default"
        note = f"the pre-tokenizer is named {name!r} unchecked: {reason}"
        return replace(found, pre=name, notes=(*notes, note))
    text = sample_text(tokenizer)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    for name in PRE_TOKENIZERS:
        candidate = replace(found, pre=name, notes=notes)
        if _cut(candidate, text) == expected:
            return candidate
    note = (
        "none of llama.cpp's pre-tokenizers cuts a sample text as this tokenizer does: named "
        "'default'. Give llama.cpp token ids, or expect other tokens than transformers makes"
    )
    return replace(found, pre="default", notes=(*notes, note))


def _check(found: Vocabulary, tokenizer: Any, parsed: dict[str, Any]) -> Vocabulary:
    """The vocabulary with a note where llama.cpp cuts the sample otherwise."""
    notes = _normalizer_notes(parsed)
    if missing() is not None:
        return replace(found, notes=(*notes, f"the tokenizer is unchecked: {missing()}"))
    text = sample_text(tokenizer)
    if _cut(found, text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
        note = "llama.cpp cuts a sample text into other tokens than transformers: give it token ids"
        notes = (*notes, note)
    return replace(found, notes=notes)


def sample_text(tokenizer: Any) -> str:
    """SAMPLE, and the texts of tokens that the tokenizer has, one behind the other.

    A pre-tokenizer forbids merges, and its own tokens are those that it could forbid: digits after
    digits, blanks after letters.
    """
    special, size = set(tokenizer.all_special_ids), len(tokenizer)
    numbers = [i for i in range(0, size, max(1, size // _SAMPLED)) if i not in special]
    texts = [tokenizer.decode([number]) for number in numbers]
    return SAMPLE + "".join(text for text in texts if "\ufffd" not in text)


def _normalizer_notes(parsed: dict[str, Any]) -> tuple[str, ...]:
    """What the tokenizer does to a text first that llama.cpp does not."""
    steps = {step["type"] for step in _steps(parsed.get("normalizer"))} - {"Prepend", "Replace"}
    if not steps:
        return ()
    names = ", ".join(sorted(steps))
    note = f"llama.cpp leaves out the tokenizer's normalizer ({names}), and cuts what it changes"
    return (f"{note} otherwise",)


def _cut(vocabulary: Vocabulary, text: str) -> list[int]:
    """The tokens that llama.cpp makes of a text with this vocabulary, in a model of one width."""
    with tempfile.TemporaryDirectory(prefix="smelt-tokens-") as folder:
        path = Path(folder) / "tokens.gguf"
        write_empty_model(path, vocabulary)
        with Engine(path, context=32) as engine:
            return engine.tokenise(text)


def write_empty_model(path: Path, vocabulary: Vocabulary) -> None:
    """The smallest model that llama.cpp loads, with these tokens."""
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, "llama")
    D = 32
    sizes = {"block_count": 1, "context_length": 32, "embedding_length": D}
    sizes |= {"feed_forward_length": D, "attention.head_count": 1}
    for name, number in sizes.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    vocabulary.write(writer)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}": (D, D) for name in square}
    shapes |= {"blk.0.attn_norm": (D,), "blk.0.ffn_norm": (D,), "output_norm": (D,)}
    shapes["token_embd"] = (len(vocabulary.tokens), D)
    for name, shape in shapes.items():
        writer.add_tensor(
            f"{name}.weight", np.zeros(shape, np.float16 if len(shape) > 1 else np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
