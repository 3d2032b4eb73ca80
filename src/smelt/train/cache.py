"""Where tokenised text is kept between runs: a folder per key, written whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smelt.errors import RecipeError
from smelt.settings import expand_environment
from smelt.text import library
from smelt.text.sources import TextSource

FORMAT = 1  # of what the folders hold; another number reads nothing older


def cache_folder(named: str | None) -> Path:
    """The folder a recipe names, or `$SMELT_CACHE`, or `~/.cache/smelt/tokens`."""
    found = expand_environment(named) if named else os.environ.get("SMELT_CACHE")
    return Path(found or "~/.cache/smelt/tokens").expanduser()


def key(sources: Sequence[TextSource], **settings: Any) -> str:
    """A name for what is made of the sources: equal for equal text and settings.

    Text is known by the names, sizes and times of change of its files, so that looking costs no
    reading; a data set by its id.
    """
    text = [{**asdict(source), "files": _identity(source)} for source in sources]
    spelt = json.dumps({"format": FORMAT, "text": text, **settings}, sort_keys=True)
    return hashlib.sha256(spelt.encode()).hexdigest()[:32]


def _identity(source: TextSource) -> list[tuple[str, int, int]]:
    if source.kind == "dataset":
        return []
    if source.kind == "python":
        # The times of an installed library say nothing: two installations hold the same text.
        topics = len("".join(library.library_topics().values()))
        files = [(name, path.stat().st_size, 0) for name, path in library.library_files()]
        return [*files, ("topics", topics, 0)]
    location = Path(expand_environment(source.location)).expanduser()
    if location.is_file():
        paths = [location]
    elif location.is_dir():
        paths = sorted(path for path in location.rglob("*") if path.is_file())
    else:
        root = Path(location.anchor or ".")
        pattern = str(location.relative_to(root) if location.anchor else location)
        paths = sorted(path for path in root.glob(pattern) if path.is_file())
    stats = [(path, path.stat()) for path in paths]
    return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def kept(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name, made by `make` in a folder of its own the first time.

    Several processes may ask at once: each makes its own, the first one done is kept.
    """
    found = folder / name
    if found.is_dir():
        return found
    partial = folder / f"{name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(
            f"{folder}: tokenised text cannot be kept there ({error.strerror}). Set text.cache or "
            "the environment variable SMELT_CACHE to a folder that can be written."
        ) from None
    try:
        make(partial)
        try:
            partial.rename(found)
        except OSError:
            if not found.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found
