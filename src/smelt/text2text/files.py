"""Task files as items: which split may be used for what, and what is wrong in which line."""

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from smelt.errors import RecipeError, SmeltError
from smelt.text2text.items import Item
from smelt.text2text.readers import BadRecordError
from smelt.text2text.tasks import TASKS, Task

Part = Literal["train", "choose", "report"]
"""For training; for choosing anything (rates, steps, checkpoints); for the number that is told."""

HELD_OUT = 10  # where choosing has no file of its own: one source of the training split in so many


@dataclass(frozen=True)
class Items:
    """The items of a part of a benchmark."""

    task: str
    split: str  # the file they are of
    items: tuple[Item, ...]
    num_records: int  # of the whole file
    sha256: str  # of the file's records
    note: str = ""  # which of the file's items these are, if not all

    def __str__(self) -> str:
        """As a person names them: file and split, and whether they are a subset."""
        published = TASKS[self.task].published[self.split]
        notes = [self.note] if self.note else []
        if self.num_records < published:
            notes.insert(0, f"subset: {self.num_records:,} of {published:,} records")
        return f"{self.task}/{self.split}" + (f" ({'; '.join(notes)})" if notes else "")


def read_items(
    task: str, part: Part, *, data: str | Path | None = None, limit: int | None = None
) -> Items:
    """The items of a benchmark for training, choosing or reporting.

    The split that is reported is in no other part. Where no labelled test split exists, the
    validation split is reported, and one source in ten of the training split (a paragraph, a
    passage, a pair of twin sentences; by its hash) is left out of training to choose on.

    Args:
        task: a name in `TASKS`.
        data: the folder of task files; None: the one that SMELT_DATA names.
        limit: at most so many items, evenly spaced; of grouped ones, so many whole groups.

    Raises:
        RecipeError: no such task, a limit below 1, no folder of data.
        SmeltError: a file is missing, or a line of it is no question (the line is named).
    """
    found = _task(task)
    if limit is not None and limit < 1:
        raise RecipeError(f"limit = {limit}: at least one item is needed. Leave it out for all.")
    split = {"train": "train", "choose": found.choose or "train", "report": found.report}[part]
    read = read_split(task, split, data=data)
    if split == "train" and found.choose is None:
        kept = tuple(one for one in read.items if is_held_out(one) == (part == "choose"))
        note = "one source in ten" if part == "choose" else "without one source in ten"
        read = replace(read, items=kept, note=note)
    return read if limit is None else _limited(read, limit)


def read_split(task: str, split: str, *, data: str | Path | None = None) -> Items:
    """All items of one file of a benchmark. Arguments and errors as of `read_items`."""
    found = _task(task)
    path = data_folder(data) / task / f"{split}.jsonl.gz"
    digest = hashlib.sha256()
    items: list[Item] = []
    number = 0
    for number, line in enumerate(_lines(path), 1):
        digest.update(line.encode())
        items += _record(found, line, f"{split}:{number}", f"{path}, line {number}")
    if not items:
        raise SmeltError(f"{path}: holds no record. Compare the file with its source.")
    if found.kind == "rank":
        items = _numbered(items)
    return Items(task, split, tuple(items), number, digest.hexdigest())


def is_held_out(item: Item) -> bool:
    """Whether a training item is kept for choosing, by the SHA-256 of its source."""
    key = hashlib.sha256((item.source or item.name).encode()).hexdigest()
    return int(key, 16) % HELD_OUT == 0


def data_folder(data: str | Path | None = None) -> Path:
    """The folder of task files: the one given, or that SMELT_DATA names."""
    named = os.environ.get("SMELT_DATA") if data is None else str(data)
    if not named:
        raise RecipeError(
            "Task files are read from a local folder, and none is named. Set SMELT_DATA to it: "
            "it holds <task>/<split>.jsonl.gz (docs/evaluation.md)."
        )
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise RecipeError(f"{named}: there is no such folder of task files. Mend SMELT_DATA.")
    return folder


def _task(name: str) -> Task:
    if name not in TASKS:
        raise RecipeError(f"there is no task {name!r}. The tasks are: {', '.join(TASKS)}.")
    return TASKS[name]


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from file
    except FileNotFoundError:
        raise SmeltError(f"{path}: there is no such task file. Put it there.") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise SmeltError(f"{path}: cannot be read ({error}). Copy the file again.") from None


def _record(task: Task, line: str, place: str, where: str) -> list[Item]:
    try:
        record: Any = json.loads(line)
    except ValueError:
        raise SmeltError(f"{where}: is no JSON. Mend the line.") from None
    if not isinstance(record, dict):
        raise SmeltError(f"{where}: {line.strip()[:60]!r} is no record. Mend the line.")
    missing = [field for field in task.fields if field not in record]
    if missing:
        raise SmeltError(
            f"{where}: the field {missing[0]!r} is missing. {task.title} needs: "
            f"{', '.join(task.fields)}."
        )
    try:
        return list(task.read(record, place))
    except BadRecordError as error:
        raise SmeltError(f"{where}: {error}. Mend the line, or leave it out.") from None


def _numbered(items: Sequence[Item]) -> list[Item]:
    """Items whose cue says their place in their group."""
    places: Counter[str] = Counter()
    found = []
    for item in items:
        places[item.group] += 1
        found.append(replace(item, cue=f"{item.cue.rstrip(':')} {places[item.group]}:"))
    return found


def _limited(read: Items, limit: int) -> Items:
    """Whole groups, evenly spaced; an item without a group is one of its own."""
    groups: dict[str, list[Item]] = {}
    for item in read.items:
        groups.setdefault(item.group or item.name, []).append(item)
    kept = list(groups.values())
    if limit >= len(kept):
        return read
    chosen = [item for i in range(limit) for item in kept[i * len(kept) // limit]]
    what = "groups of items" if read.items[0].group else "items"
    note = "; ".join(filter(None, (read.note, f"{limit:,} of {len(kept):,} {what}")))
    return replace(read, items=tuple(chosen), note=note)
