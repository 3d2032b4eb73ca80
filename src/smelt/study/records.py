"""Records: the figures of finished runs in one file, so that a study outlives its machine.

Weights stay behind: a run of which a record is there is finished for the tables and for everything
that is not made from its weights.
"""

import datetime
import gzip
import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from smelt.errors import RecipeError
from smelt.outputs import check_writable
from smelt.study.store import Store

KINDS = ("json", "outcomes.json")
"""Endings of the files beside a run's folder that its record holds."""
INSIDE = ("smelt/training.json", "smelt/recipe.yaml")
"""Files in a run's folder that its record holds."""

TIMED = ("decode.json", "latency.json")
"""Names of records that hold what was timed of a whole study."""


class Records:
    """A file of records: a JSON object a line, packed by gzip if its name ends with .gz.

    Of one run the last line holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check_writable(self) -> None:
        """Before anything runs: a run whose figures cannot be kept would be lost with its machine.

        Raises:
            RecipeError: a file that cannot be written, or made where it is to be.
        """
        if not self.path.exists():
            check_writable(self.path)
        elif not (self.path.is_file() and os.access(self.path, os.W_OK)):
            raise RecipeError(
                f"{self.path}: no records can be written there. Name a file that can be written, "
                "such as a.jsonl."
            )

    def keep(self, store: Store, name: str) -> None:
        """Add the figures of a run that has just finished, or what was timed of the study."""
        files = _files(store, name)
        day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        line = {"name": name, "day": day, "machine": _processor(), "files": files}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open("at") as file:
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")

    def complete(self, store: Store, names: Iterable[str]) -> None:
        """Add the figures of those runs of which the file has nothing, or others than the store.

        They were done by a process that was killed before it had written, or by one without a file.
        """
        known = self._latest()
        for name in names:
            files = _files(store, name)
            said = json.dumps(files, sort_keys=True)  # as text: NaN is unlike itself
            if files and said != json.dumps(known.get(name), sort_keys=True):
                self.keep(store, name)

    def _latest(self) -> dict[str, dict[str, Any]]:
        """What the file holds of each run."""
        if not self.path.is_file():
            return {}
        return {line["name"]: line["files"] for line in self._lines()}

    def restore(self, store: Store) -> list[str]:
        """Lay out the records of runs of which the store has nothing; their names.

        Raises:
            RecipeError: a line that is no record, a folder in the place of the file.
        """
        if self.path.is_dir():
            raise RecipeError(
                f"{self.path}: is a folder. Name a file for the records, such as a.jsonl."
            )
        restored = []
        for name, files in self._latest().items():
            places = _places(store, name)
            if store.is_begun(name) or any(path.exists() for path in places.values()):
                continue
            for key, value in files.items():
                path = places[key]
                path.parent.mkdir(parents=True, exist_ok=True)
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                path.write_text(text, encoding="utf-8")
            restored.append(name)
        return restored

    def _lines(self) -> Iterator[dict[str, Any]]:
        known, done = {*KINDS, *INSIDE}, 0
        try:
            with self._open("rt") as file:
                for text in file:
                    line = json.loads(text)
                    if not isinstance(line["name"], str) or line["files"].keys() - known:
                        raise KeyError("name")
                    yield line
                    done += 1
        except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, zlib.error):
            raise RecipeError(
                f"{self.path}: what follows line {done} is no record of a run. Restore the file, "
                "or name another one."
            ) from None

    def _open(self, mode: str) -> IO[str]:
        if self.path.suffix == ".gz":
            return gzip.open(self.path, mode, encoding="utf-8")  # type: ignore[return-value]
        return self.path.open(mode, encoding="utf-8")


def forget(store: Store, name: str) -> None:
    """Remove all that the store holds of a run."""
    shutil.rmtree(store.run(name), ignore_errors=True)
    for kind in KINDS:
        store.beside(name, kind).unlink(missing_ok=True)


def _places(store: Store, name: str) -> dict[str, Path]:
    if name in TIMED:
        return {"json": store.folder / name}
    inside = {key: store.run(name) / key for key in INSIDE}
    return {kind: store.beside(name, kind) for kind in KINDS} | inside


def _files(store: Store, name: str) -> dict[str, Any]:
    """The files that say what came of a run, as far as they are there."""
    places = _places(store, name)
    return {key: _content(key, path) for key, path in places.items() if path.is_file()}


def _content(key: str, path: Path) -> Any:
    """A file as a record holds it: of outcomes the values by unit, which tables need."""
    text = path.read_text(encoding="utf-8")
    if not key.endswith("json"):
        return text
    value = json.loads(text)
    return {"values": value["values"]} if key == "outcomes.json" else value


def _processor() -> str:
    """The processor's name, so that times of other machines are known as such."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
