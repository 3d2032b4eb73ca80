"""Task files as items: parsed, tried out, a limit spread evenly, a hash of what is asked."""

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smelt.errors import SmeltError
from smelt.evaluate.task_kinds import Row, Task
from smelt.evaluate.task_metrics import units


@dataclass(frozen=True)
class Items:
    """The items of a task that are asked: all of its file, or every so many of them."""

    name: str
    task: Task
    rows: list[Row]
    sha256: str  # of the items as the file spells them
    shots: int = 0  # solved examples before every question
    examples: list[Row] = field(default_factory=list)  # they are drawn from

    def __str__(self) -> str:
        """As a person names them: file and split, that they are a subset, and the examples."""
        folder = self.task.folder or self.name
        text = f"{folder}/{self.task.split}"
        if len(self.rows) != self.task.published:
            text += f" (subset: {len(self.rows):,} of {self.task.published:,} items)"
        return text + (f", {self.shots} solved examples before each" if self.shots else "")


def read_task(
    name: str, task: Task, folder: Path, *, limit: int | None = None, shots: int = 0
) -> Items:
    """The items of a task from its file, and the examples that it is shown.

    Raises:
        SmeltError: a file is missing or damaged; a line is not an item of this task (it is named).
    """
    records = _records(name, task, task.split, folder)
    if task.items is None:
        kept = [records[i] for i in _spread(len(records), limit)]
        spelt = "".join(one.spelt for one in kept)
    else:
        every = [item for one in records for item in _items(task, one)]
        groups = list(units(task, [one.row for one in every], grouped=True).values())
        kept = [every[i] for at in _spread(len(groups), limit) for i in groups[at]]
        spelt = "".join(json.dumps(one.row, ensure_ascii=False) for one in kept)
    rows = [_tried(task, one, place) for place, one in enumerate(kept)]
    examples: list[Row] = []
    if shots:
        shown = _records(name, task, str(task.examples), folder)
        examples = [_tried(task, one, place) for place, one in enumerate(shown)]
    return Items(name, task, rows, hashlib.sha256(spelt.encode()).hexdigest(), shots, examples)


@dataclass(frozen=True)
class _Record:
    """One record of a file, or one item of it."""

    row: Row
    spelt: str  # as the file has it
    where: str
    number: str  # its name in the file


def _spread(size: int, limit: int | None) -> list[int]:
    count = size if limit is None else min(limit, size)
    return [i * size // count for i in range(count)]


def _records(name: str, task: Task, split: str, folder: Path) -> list[_Record]:
    """Every record of a file."""
    path = folder / (task.folder or name) / f"{split}{'.txt' if task.records else '.jsonl.gz'}"
    try:
        if task.records is not None:
            pages = task.records(path.read_text(encoding="utf-8"))
            found = [
                _Record(row, str(row), f"{path}, page {i}", str(i)) for i, row in enumerate(pages)
            ]
        else:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                found = [
                    _parsed(line, f"{path}, line {i}", str(i - 1))
                    for i, line in enumerate(file, 1)
                    if line.strip()
                ]
    except FileNotFoundError:
        raise SmeltError(
            f"{path}: there is no such file, and the task {name} is read from it."
        ) from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        kind = "UTF-8" if task.records else "gzipped UTF-8"
        raise SmeltError(f"{path}: cannot be read as {kind} ({error}).") from None
    if not found:
        raise SmeltError(f"{path}: holds no item.")
    return found


def _parsed(line: str, where: str, number: str) -> _Record:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise SmeltError(
            f"{where}: is no JSON ({error}). Mend the line, or copy the file again."
        ) from None
    if not isinstance(found, dict):
        raise SmeltError(
            f"{where}: {line.strip()[:60]!r} is no record. A line is one object with the fields of "
            "an item."
        )
    return _Record(found, line, where, number)


def _items(task: Task, record: _Record) -> list[_Record]:
    """The items of one record."""
    assert task.items is not None
    try:
        rows = task.items(record.row)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _unlike(task, record, error) from None
    return [
        _Record(row, record.spelt, record.where, f"{record.number}-{i}")
        for i, row in enumerate(rows)
    ]


def _tried(task: Task, record: _Record, place: int) -> Row:
    """One item and its place, tried out: a file of another kind is found before any model runs."""
    try:
        fields = task.fields if task.items is None else tuple(record.row)
        row = {name: record.row[name] for name in fields}
        row |= {"place": place, "number": record.number}
        question, answer = task.ask(row), task.target(row)
        if task.choices is not None:
            right = question if task.is_infill else answer
            if right not in range(len(task.choices(row))):
                raise ValueError(f"answer {right} of {len(task.choices(row))} choices")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _unlike(task, record, error) from None
    return row


def _unlike(task: Task, record: _Record, error: Exception) -> SmeltError:
    return SmeltError(
        f"{record.where}: not an item of this task ({type(error).__name__}: {error}). A record has "
        f"the fields {', '.join(task.fields)}."
    )
