"""Where text comes from: files, jsonl, a `datasets` id, the running Python's own library."""

import glob
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from smelt.errors import CalibrationError
from smelt.settings import expand_environment
from smelt.text import library
from smelt.text.pieces import (
    LOOK_BYTES,
    Document,
    Shelf,
    file_shelf,
    in_windows,
    is_text,
    plain_text,
    row_document,
)

Kind = Literal["files", "jsonl", "dataset", "python"]
Split = Literal["train", "held-out", "all"]
Part = Literal["all", "code", "prose"]


@dataclass(frozen=True)
class TextSource:
    """One source of text and its share of the mixture; `weight` counts tokens, not documents.

    A `${NAME}` in `location` is replaced by that environment variable when the text is read.
    """

    kind: Kind
    location: str = ""  # path, glob, folder; dataset id "name:config:split"; "" for python
    weight: float = 1.0
    field: str = "text"  # the jsonl field or dataset column
    split: Split = "train"  # python only: see `smelt.text.library.is_held_out`
    part: Part = "all"  # python only: library source (code), documentation (prose)

    def __post_init__(self) -> None:
        for name, allowed in (("kind", Kind), ("split", Split), ("part", Part)):
            if getattr(self, name) not in get_args(allowed):
                raise CalibrationError(
                    f"text source: {name} is {getattr(self, name)!r}. "
                    f"It can be: {', '.join(get_args(allowed))}."
                )
        if not 0 < self.weight < float("inf"):
            raise CalibrationError(
                f"text source {self}: weight {self.weight}. A weight is a positive number."
            )

    def __str__(self) -> str:
        """The source as a person would type it."""
        if self.kind != "python":
            return self.location
        return f"python:{self.split}" + ("" if self.part == "all" else f":{self.part}")


def parse_source(text: str) -> TextSource:
    """The source that a command-line word names, e.g. `notes.txt`, `a.jsonl=0.3`, `python:code`.

    A word is, in this order: `python[:train|held-out|all][:code|prose]`; a `.jsonl` or `.jsonl.gz`
    path; a `datasets` id `owner/name[:config[:split]]`, unless a file of that name exists or it
    looks like a path; else a file, a folder or a glob.
    """
    text, weight = _split_weight(text.strip())
    if not text:
        raise CalibrationError(
            "An empty text source was given. Name a file, a folder, a .jsonl, a datasets id "
            "(owner/name) or 'python'."
        )
    if text.partition(":")[0] == "python":
        return _parse_python(text, weight)
    if re.search(r"\.jsonl(\.gz)?$", text):
        return TextSource("jsonl", text, weight)
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[^:/]*){0,2}", text) or ":" in text
    is_path = re.search(r"^[/.~$]|[*?\[]|/$|\.(txt|md|rst|py|text|gz)$", text)
    if is_id and not is_path and not Path(text).exists():
        return TextSource("dataset", text, weight)
    return TextSource("files", text, weight)


def as_source(value: str | Mapping[str, Any] | TextSource) -> TextSource:
    """The source that a recipe spells: a word as on the command line, or a mapping of settings."""
    if isinstance(value, TextSource):
        return value
    if isinstance(value, str):
        return parse_source(value)
    known = [field.name for field in fields(TextSource)]
    unknown = sorted(set(value) - set(known))
    if unknown or "kind" not in value:
        raise CalibrationError(
            f"text source {dict(value)}: "
            + (f"there is no setting {unknown[0]!r}. " if unknown else "'kind' is missing. ")
            + f"The settings here are: {', '.join(known)}."
        )
    return TextSource(**value)


def read_documents(source: TextSource) -> Iterator[str]:
    """The documents of a source in their own, fixed order: a long file comes in 1 MiB pieces."""
    for shelf in _shelves(source, 1 << 20):
        for index in range(shelf.num_pieces):
            yield from map(plain_text, _read(shelf, index, None, source))


def draw_documents(
    source: TextSource, generator: torch.Generator, piece_bytes: int
) -> Iterator[Document]:
    """The documents of a source in random order, long files in pieces of about `piece_bytes`.

    Only what is drawn is read. Pieces of plain files are entered at random; a compressed file or a
    data set can only be read from its start, and is shuffled window by window (64 MiB).
    """
    shelves = _shelves(source, max(piece_bytes, LOOK_BYTES))
    ends = torch.tensor([shelf.num_pieces for shelf in shelves]).cumsum(0)
    order = torch.randperm(int(ends[-1]) if shelves else 0, generator=generator)
    for place in order.tolist():
        at = int(torch.searchsorted(ends, place, right=True))
        shelf = shelves[at]
        yield from _read(shelf, place - int(ends[at]) + shelf.num_pieces, generator, source)


def check_source(source: TextSource) -> None:
    """Look whether a source is there, as far as can be told without reading it.

    Raises:
        CalibrationError: files that are not there, a folder without text.
        RecipeError: an environment variable that is not set.
    """
    if source.kind == "dataset":
        expand_environment(source.location)
    elif source.kind != "python":
        _paths(source)


def _read(
    shelf: Shelf, index: int, generator: torch.Generator | None, source: TextSource
) -> Iterator[Document]:
    try:
        yield from shelf.read(index, generator)
    except OSError as error:
        raise CalibrationError(f"{source}: cannot be read ({error}).") from None


def _split_weight(text: str) -> tuple[str, float]:
    match = re.fullmatch(r"(.+)=([0-9.]+(?:e-?\d+)?)", text)
    if match is None or Path(text).exists():
        return text, 1.0
    try:
        return match[1], float(match[2])
    except ValueError:
        return text, 1.0


def _parse_python(text: str, weight: float) -> TextSource:
    chosen: dict[str, Any] = {}
    for word in text.split(":")[1:]:
        key = "split" if word in get_args(Split) else "part"
        if word not in (*get_args(Split), *get_args(Part)) or key in chosen:
            raise CalibrationError(
                f"text source {text!r}: {word!r} does not fit. Write python[:train|held-out|all]"
                "[:code|prose], e.g. python:held-out:prose."
            )
        chosen[key] = word
    return TextSource("python", weight=weight, **chosen)


def _shelves(source: TextSource, piece_bytes: int) -> list[Shelf]:
    if source.kind == "python":
        return _library_shelves(source, piece_bytes)
    if source.kind == "dataset":
        return [
            Shelf(1, lambda _, generator: in_windows(_dataset_rows(source), generator, 1 << 22))
        ]
    return [file_shelf(path, source.field, piece_bytes) for path in _paths(source)]


def _library_shelves(source: TextSource, piece_bytes: int) -> list[Shelf]:
    """Code is the library's files; prose its documentation topics and its docstrings.

    All of it is code and topics: the docstrings are in the code already.
    """
    chosen = [path for name, path in library.library_files() if library.is_in(name, source.split)]
    shelves = []
    if source.part in ("all", "code"):
        shelves += [file_shelf(path, source.field, piece_bytes) for path in chosen]
    if source.part in ("all", "prose"):
        topics = library.library_topics()
        shelves += [
            Shelf(1, partial(_one, partial(topics.__getitem__, name)))
            for name in topics
            if library.is_in(f"topics/{name}", source.split)
        ]
    if source.part == "prose":
        shelves += [Shelf(1, partial(_one, partial(library.docstrings, path))) for path in chosen]
    return shelves


def _one(text: Callable[[], str], _: int, __: torch.Generator | None) -> list[Document]:
    return [text()]


def _paths(source: TextSource) -> list[Path]:
    """The files a location names, sorted; in a folder or glob those that are not text are left."""
    location = expand_environment(source.location)
    path = Path(location).expanduser()
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*")) if path.is_dir() else []
    if glob.has_magic(location):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    elif not path.exists():
        raise CalibrationError(
            f"{location}: there is no such text. Give a file, a folder, a glob, a .jsonl, "
            "a datasets id (owner/name) or 'python'."
        )
    files = [file for file in found if file.is_file() and is_text(file)]
    if not files:
        raise CalibrationError(f"{location}: holds no text file. Point at UTF-8 text files.")
    return files


def _dataset_rows(source: TextSource) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"{source}: reading a datasets id needs the datasets library. "
            "Install it with: pip install 'smelt[eval]'."
        ) from None
    name, *rest = expand_environment(source.location).split(":")
    config, split = (*rest, "", "")[:2]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            try:
                yield row_document(row, source.field)
            except ValueError as error:
                raise CalibrationError(f"{source}, row {number}: {error}") from None
    except CalibrationError:
        raise
    except Exception as error:  # the library's own errors, and those of the network below it
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"{source}: the data set cannot be read ({type(error).__name__}: {reason}). "
            "Check the id, config and split, and the network; or give a local file."
        ) from None
