"""The embedded default text: the running Python's own library, its source and its documentation."""

import ast
import hashlib
import sysconfig
import warnings
from functools import cache
from pathlib import Path

from smelt.errors import CalibrationError

HELD_OUT_SHARE = 12  # one name in so many is held out

# Not library source: other people's packages, tests, copies, and data that only looks like code.
SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages test tests idle_test lib2to3 __pycache__ turtledemo "
    "encodings pydoc_data lib-dynload _bundled".split()
)
SKIPPED_FILES = ("_sysconfigdata", "entities.py", "this.py", "__phello__")


def is_held_out(name: str) -> bool:
    """Whether a library file or documentation topic is held out of training, by a fixed rule.

    The rule: SHA-256 of the name (POSIX path below the library folder, or `topics/NAME`), read as
    a big-endian number, is a multiple of 12. It does not depend on the Python version or platform.
    """
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def is_in(name: str, split: str) -> bool:
    """Whether a name belongs to `train`, `held-out` or `all`."""
    return split == "all" or is_held_out(name) == (split == "held-out")


@cache
def library_files() -> tuple[tuple[str, Path], ...]:
    """The library's source files as (name, path), sorted by name: no tests, no generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[-1].startswith(SKIPPED_FILES):
            found.append(("/".join(parts), path))
    if not found:
        raise CalibrationError(
            f"text source 'python': there is no library source below {root}. "
            "Give a text file, a folder or a .jsonl instead."
        )
    return tuple(sorted(found))


def library_topics() -> dict[str, str]:
    """The language reference topics that `help()` shows, by name; none where they are left out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return dict(sorted(topics.items()))


def docstrings(path: Path) -> str:
    """The docstrings of a source file in their order, divided by blank lines; "" without any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file's own invalid escapes are not the user's business
        tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))
