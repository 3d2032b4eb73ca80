"""Documents out of files, a piece at a time: long files are cut, entered anywhere, never held."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smelt.errors import CalibrationError

Document = str | list[dict[str, Any]]  # a list: the messages of one chat

WINDOW_BYTES = 1 << 26  # what cannot be entered at random is shuffled in windows of this size
LOOK_BYTES = 4096  # how far a cut in a long file may move to fall between two paragraphs


def plain_text(document: Document) -> str:
    """The text of a document; a chat is its messages' contents, divided by blank lines."""
    if isinstance(document, str):
        return document
    return "\n\n".join(str(message["content"]) for message in document)


@dataclass(frozen=True)
class Shelf:
    """Pieces of text that can be read one by one, in any order."""

    num_pieces: int
    read: Callable[[int, torch.Generator | None], Iterable[Document]]


def file_shelf(path: Path, field: str, piece_bytes: int) -> Shelf:
    """The documents of a file: rows of a .jsonl, else UTF-8 text cut between paragraphs.

    A plain file can be entered anywhere. A compressed one (.gz) is read from its start, and
    shuffled window by window (64 MiB).
    """
    if path.suffix == ".gz":
        return Shelf(1, partial(_read_gzip, path, field, piece_bytes))
    num_pieces = -(-path.stat().st_size // piece_bytes)
    if path.suffix == ".jsonl":
        return Shelf(num_pieces, partial(_read_jsonl, path, field, piece_bytes))
    return Shelf(num_pieces, partial(_read_text, path, piece_bytes))


def is_text(path: Path) -> bool:
    """Whether a file begins like UTF-8 text; hidden files do not count as text."""
    if path.name.startswith("."):
        return False
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(LOOK_BYTES)
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > LOOK_BYTES - 4 and b"\0" not in head
    except (OSError, EOFError, zlib.error):
        return False
    return b"\0" not in head


def _decode(data: bytes, path: Path) -> str:
    try:
        if b"\0" not in data:
            return data.decode()
        problem = "holds NUL bytes"
    except UnicodeDecodeError as error:
        problem = f"byte {data[error.start]:#04x} is not UTF-8"
    raise CalibrationError(f"{path}: is not text ({problem}). Give plain UTF-8 text or .jsonl.")


def _read_text(
    path: Path, piece_bytes: int, index: int, _: torch.Generator | None
) -> list[Document]:
    with path.open("rb") as file:
        begin = _cut(file, index * piece_bytes)
        end = _cut(file, (index + 1) * piece_bytes)
        file.seek(begin)
        return [_decode(file.read(end - begin), path)]


def _cut(file: Any, position: int) -> int:
    """The cut nearest after a nominal position: after a blank line, a line, or a character."""
    if position == 0:
        return 0
    file.seek(position)
    ahead = file.read(LOOK_BYTES)
    for mark in (b"\n\n", b"\n"):
        if (found := ahead.find(mark)) >= 0:
            return int(position + found + len(mark))
    tail = next((i for i, byte in enumerate(ahead[:4]) if byte & 0xC0 != 0x80), 0)
    return int(position + tail) if ahead else int(file.seek(0, 2))


def _read_jsonl(
    path: Path, field: str, piece_bytes: int, index: int, _: torch.Generator | None
) -> Iterator[Document]:
    """The rows whose line begins in the piece."""
    begin, end = index * piece_bytes, (index + 1) * piece_bytes
    with path.open("rb") as file:
        file.seek(max(begin - 1, 0))
        if begin > 0:
            file.readline()
        while (at := file.tell()) < end and (line := file.readline()):
            yield from _row(line, field, path, partial(_line_number, path, at))


def _line_number(path: Path, position: int) -> int:
    with path.open("rb") as file:
        return 1 + file.read(position).count(b"\n")


def _read_gzip(
    path: Path, field: str, piece_bytes: int, _: int, generator: torch.Generator | None
) -> Iterator[Document]:
    rows = _gzip_rows(path, field) if ".jsonl" in path.suffixes else _gzip_text(path, piece_bytes)
    try:
        yield from in_windows(rows, generator, WINDOW_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(
            f"{path}: cannot be decompressed ({error}). Copy it again."
        ) from None


def _gzip_rows(path: Path, field: str) -> Iterator[Document]:
    with gzip.open(path) as file:
        for number, line in enumerate(file, start=1):
            yield from _row(line, field, path, partial(int, number))


def _gzip_text(path: Path, piece_bytes: int) -> Iterator[Document]:
    with gzip.open(path) as file:
        while lines := file.readlines(piece_bytes):
            yield _decode(b"".join(lines), path)


def _row(line: bytes, field: str, path: Path, number: Callable[[], int]) -> Iterator[Document]:
    """The document of one jsonl line; a blank line has none."""
    if not line.strip():
        return
    try:
        row = json.loads(_decode(line, path))
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}, line {number()}: not JSON ({error.msg}).") from None
    try:
        yield row_document(row, field)
    except ValueError as error:
        raise CalibrationError(f"{path}, line {number()}: {error}") from None


def row_document(row: Any, field: str) -> Document:
    """The text or the messages of a row; without the field, a `messages` list is taken."""
    if not isinstance(row, Mapping):
        raise ValueError("not an object. Each line is one JSON object.")
    value = row.get(field, row.get("messages"))
    if isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(message, Mapping) and "content" in message for message in value)
    ):
        return [dict(message) for message in value]
    raise ValueError(
        f"no text in field {field!r}. The fields here are: {', '.join(map(str, row))}. "
        "Name the one that holds text (or a 'messages' list)."
    )


def in_windows(
    documents: Iterable[Document], generator: torch.Generator | None, window_bytes: int
) -> Iterator[Document]:
    """The same documents, shuffled within windows of so many bytes; in order without generator."""
    if generator is None:
        yield from documents
        return
    window: list[Document] = []
    size = 0
    for document in documents:
        window.append(document)
        size += len(plain_text(document))
        if size >= window_bytes:
            yield from (window[i] for i in torch.randperm(len(window), generator=generator))
            window, size = [], 0
    yield from (window[i] for i in torch.randperm(len(window), generator=generator))
