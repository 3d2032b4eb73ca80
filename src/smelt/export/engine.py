"""llama.cpp through its C interface: quantise rows, load a GGUF file, tokenise, evaluate tokens.

The library is the one that the PyPI package xllamacpp brings, built for the CPU. Structures are
passed by value in C, so their layout matters; few fields are touched, and only where the
library's own defaults read back as they should.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smelt.errors import SmeltError

PACKAGE = "xllamacpp"
INSTALL = "pip install 'smelt[gguf]'"

_CONTEXT_WORDS = 64  # of 4 bytes; more than any version's structure, which is passed on the stack
_MODEL_WORDS = 64
_FLASH_ATTENTION, _KEY_TYPE, _VALUE_TYPE = 13, 26, 27  # words of llama_context_params
_F32, _F16, _OFF = 0, 1, 0
_MINUS_ONE = 0xBF800000  # -1.0 as a word


class EngineError(SmeltError):
    """llama.cpp is not here, is of a build that smelt does not know, or refuses a file."""


class _ContextParams(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint32 * _CONTEXT_WORDS),)


class _ModelParams(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint32 * _MODEL_WORDS),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: list[str] = []
"""The last lines that llama.cpp said; its reason for a refusal is among them."""


def _hear(level: int, text: bytes, _: Any) -> None:
    if level >= 3:  # a warning or an error; the end of a line counts as what it ends
        _said.append(text.decode(errors="replace"))
        del _said[:-50]


_listen = _LOG(_hear)
"""Held here: llama.cpp calls it for as long as the process runs."""


def missing() -> str | None:
    """Why there is no llama.cpp here; None: there is."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"llama.cpp is not installed here ({PACKAGE}): {INSTALL}"
    return None


def check_writer() -> None:
    """Raise EngineError unless the library that reads and writes GGUF files is here."""
    if importlib.util.find_spec("gguf") is None:
        raise EngineError(f"GGUF files need the package gguf: {INSTALL}.")


@functools.cache
def library() -> Any:
    """The loaded library, its functions declared.

    Raises:
        EngineError: it is not installed, or of another layout than smelt knows.
    """
    if (reason := missing()) is not None:
        raise EngineError(f"{reason}.")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    found = sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))
    if not found:
        raise EngineError(f"{PACKAGE} is installed without its library. Reinstall it: {INSTALL}.")
    lib = ctypes.CDLL(os.fspath(found[0]))
    _declare(lib)
    _check_layout(lib)
    lib.llama_log_set(_listen, None)
    lib.llama_backend_init()
    return lib


def _declare(lib: Any) -> None:
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    int_array, long = ctypes.POINTER(ctypes.c_int32), ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_backend_init": (None, []),
        "llama_log_set": (None, [_LOG, pointer]),
        "llama_model_default_params": (_ModelParams, []),
        "llama_context_default_params": (_ContextParams, []),
        "llama_model_load_from_file": (pointer, [text, _ModelParams]),
        "llama_model_free": (None, [pointer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (integer, [pointer]),
        "llama_init_from_model": (pointer, [pointer, _ContextParams]),
        "llama_set_n_threads": (None, [pointer, integer, integer]),
        "llama_free": (None, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_batch_init": (_Batch, [integer, integer, integer]),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (integer, [pointer, _Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, integer]),
        "llama_tokenize": (
            integer,
            [pointer, text, integer, int_array, integer, ctypes.c_bool, ctypes.c_bool],
        ),
        "ggml_quantize_chunk": (
            ctypes.c_size_t,
            [ctypes.c_int, pointer, pointer, long, long, long, pointer],
        ),
    }
    for name, (result, arguments) in signatures.items():
        if not hasattr(lib, name):
            raise EngineError(f"This {PACKAGE} has no {name}: {_other_build()}")
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


def _check_layout(lib: Any) -> None:
    """Raise EngineError unless the defaults of a context stand where smelt looks for them."""
    words = list(lib.llama_context_default_params().words)
    is_known = (
        words[:4] == [512, 2048, 512, 1]
        and words[16:20] == [_MINUS_ONE] * 4
        and words[_FLASH_ATTENTION] == 0xFFFFFFFF
        and (words[_KEY_TYPE], words[_VALUE_TYPE]) == (_F16, _F16)
    )
    if not is_known:
        raise EngineError(f"This {PACKAGE} lays out its settings differently: {_other_build()}")


def _other_build() -> str:
    return (
        "it is another build of llama.cpp than smelt knows. Install the version of constraints.txt."
    )


def version() -> str:
    """The installed build of llama.cpp, as its package names it."""
    from importlib.metadata import version as of

    return of(PACKAGE)


def quantise_rows(rows: NDArray[np.float32], type_id: int, row_bytes: int) -> NDArray[np.uint8]:
    """Rows [N, W] in a quantised type of ggml, as bytes [N, row_bytes].

    Args:
        type_id: the number of the type in ggml (`gguf.GGMLQuantizationType`).
        row_bytes: what a row of W numbers takes in it.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, width = rows.shape
    out = np.empty((count, row_bytes), np.uint8)
    written = library().ggml_quantize_chunk(
        type_id, rows.ctypes.data, out.ctypes.data, 0, count, width, None
    )
    assert written == out.nbytes, (written, out.nbytes)
    return out


class Engine:
    """A GGUF file loaded into llama.cpp, for one sequence of tokens at a time.

    Keys and values are kept in float32 and attention is the plain one, so that what differs from
    transformers is the weights' type and the order of additions.
    """

    def __init__(self, path: Path, *, context: int, threads: int = 1) -> None:
        """Load the file.

        Args:
            context: tokens of the longest sequence.

        Raises:
            EngineError: no llama.cpp here, or it does not take the file.
        """
        self._lib = lib = library()
        self._model = self._context = None
        self.path = path
        _said.clear()
        self._model = lib.llama_model_load_from_file(
            os.fsencode(path), lib.llama_model_default_params()
        )
        if not self._model:
            raise EngineError(f"{path}: llama.cpp cannot load this file{_reason()}.")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.num_vocabulary = int(lib.llama_vocab_n_tokens(self._vocab))
        self.context = context
        self._step = max(1, min(context, 512, (1 << 26) // self.num_vocabulary))
        params = lib.llama_context_default_params()
        params.words[:4] = [context, self._step, self._step, 1]
        params.words[_FLASH_ATTENTION] = _OFF
        params.words[_KEY_TYPE] = params.words[_VALUE_TYPE] = _F32
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise EngineError(f"{path}: llama.cpp cannot run this file{_reason()}.")
        lib.llama_set_n_threads(self._context, threads, threads)
        self._batch = lib.llama_batch_init(self._step, 0, 1)

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def tokenise(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text by llama.cpp's own tokenizer, nothing added at either end.

        Args:
            special: read the names of special tokens in the text as these tokens.
        """
        data = text.encode()
        room = len(data) + 8
        out = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), out, room, False, special)
        if count < 0:
            raise EngineError(f"{self.path}: llama.cpp cannot tokenise this text.")
        return list(out[:count])

    def forget(self) -> None:
        """Begin a new sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def logits(self, tokens: Sequence[int], *, start: int = 0) -> NDArray[np.float32]:
        """The logits [N, V] after each of these tokens.

        Args:
            start: the position of the first; 0 begins a new sequence.
        """
        if not tokens or start + len(tokens) > self.context:
            raise EngineError(
                f"{self.path}: {start + len(tokens)} tokens in a context of {self.context}."
            )
        if start == 0:
            self.forget()
        parts = [
            self._decode(tokens[i : i + self._step], start + i)
            for i in range(0, len(tokens), self._step)
        ]
        return np.concatenate(parts)

    def _decode(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.logits[i] = 1, 1
            batch.seq_id[i][0] = 0
        _said.clear()
        if self._lib.llama_decode(self._context, batch) != 0:
            raise EngineError(f"{self.path}: llama.cpp cannot evaluate the tokens{_reason()}.")
        rows = [
            np.ctypeslib.as_array(
                self._lib.llama_get_logits_ith(self._context, i), (self.num_vocabulary,)
            )
            for i in range(len(tokens))
        ]
        return np.stack(rows)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest next tokens after a prompt, each after the ones before."""
        row = self.logits(prompt)[-1]
        made: list[int] = []
        for place in range(len(prompt), len(prompt) + count):
            made.append(int(row.argmax()))
            if len(made) < count:
                row = self.logits(made[-1:], start=place)[0]
        return made


def _reason() -> str:
    """The last thing that llama.cpp complained of, in brackets."""
    lines = [line for line in "".join(_said).splitlines() if line.strip()]
    return f" ({lines[0].strip().rstrip('.')})" if lines else ""
