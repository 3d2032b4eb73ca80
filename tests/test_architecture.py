"""The shape of the project is a law like any other: what imports what."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from project import ROOT, project_files

SOURCE = ROOT / "src" / "smelt"

ORDER = (
    ("errors",),
    ("outputs",),
    ("settings",),
    ("recipe",),
    ("plugins",),
    ("processes",),
    ("experts",),
    ("factors",),
    ("routing",),
    ("text",),
    ("text2text",),
    ("checkpoint",),
    ("compress", "samoe"),  # beside each other: neither knows the other
    ("export",),
    ("train",),
    ("evaluate",),
    ("bench",),
    ("analyse",),
    ("study",),
    ("comparison",),
    ("operators",),
    ("report",),
    ("api",),
    ("cli",),
)
"""Imports point from right to left. A new package gets its place here and in CONTRIBUTING.md."""

PURE = (
    "smelt.experts",
    "smelt.factors",
    "smelt.routing",
    "smelt.compress.similarity",
    "smelt.compress.budget",
    "smelt.compress.group",
    "smelt.compress.align",
    "smelt.compress.members",
    "smelt.compress.merge",
    "smelt.compress.rebasin",
    "smelt.compress.fisher",
    "smelt.compress.regmean",
    "smelt.compress.repair",
    "smelt.compress.zipit",
    "smelt.compress.rules",
    "smelt.compress.closed_form",
    "smelt.compress.grouping",
    "smelt.compress.least_squares",
    "smelt.compress.subspace",
    "smelt.compress.refit",
    "smelt.compress.decompose",
    "smelt.compress.ranks",
    "smelt.compress.grams",
    "smelt.compress.units",
    "smelt.train.distill",
    "smelt.train.sparsify",
)
"""Algorithms over tensors: testable in milliseconds, on a machine without transformers."""

COPIED = (
    "smelt.checkpoint.mapped",
    "smelt.checkpoint.factored",
    "smelt.checkpoint.factored_forward",
)
"""Modules of which a copy lies beside the weights of a mapped checkpoint."""

INSIDERS = ("checkpoint", "samoe")
"""The packages that know transformers from the inside; the rest uses its public names."""


# --- the source, parsed --------------------------------------------------------------------------


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(name: str) -> ast.Module:
    path = modules()[name]
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(name: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a module imports, inside functions and for types too."""
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            if node.level and name in COPIED:  # a copy has its neighbours only
                yield node.lineno, f"smelt.checkpoint.{node.module}"
                continue
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in modules() else node.module


def own_imports(name: str) -> Iterator[tuple[int, str]]:
    """The imports of a module that stay inside smelt."""
    for line, target in imports(name):
        if target.split(".")[0] == "smelt":
            yield line, target


def part(name: str) -> str | None:
    """The package or module directly under smelt that a name belongs to; None for smelt itself."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else None


def inner_modules() -> list[str]:
    """The modules that have a place in the order: `smelt` and `python -m smelt` see everything."""
    return [name for name in modules() if part(name) not in (None, "__main__")]


RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def test_every_module_has_a_place_in_the_order():
    unplaced = sorted({str(part(name)) for name in inner_modules()} - RANK.keys())
    assert not unplaced, f"not in ORDER: {unplaced}. Place each here and in CONTRIBUTING.md."


@pytest.mark.parametrize("name", inner_modules())
def test_imports_point_one_way(name):
    own = part(name)
    wrong = [
        f"{name}:{line} imports {target}"
        for line, target in own_imports(name)
        if part(target) != own and RANK.get(str(part(target)), len(ORDER)) >= RANK[str(own)]
    ]
    assert not wrong, wrong


def test_no_two_modules_import_each_other():
    # Imports inside functions count: they hide a cycle, they do not remove it.
    graph = {name: {t for _, t in own_imports(name) if t != name} for name in inner_modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' → '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("name", [name for name in PURE if name in modules()])
def test_algorithms_need_torch_and_scipy_only(name):
    libraries = {"torch", "scipy", "numpy", "jaxtyping", *sys.stdlib_module_names}
    own = {"smelt.errors", "smelt.plugins", *PURE}
    foreign = [
        f"{name}:{line} imports {target}"
        for line, target in imports(name)
        if target not in own and target.split(".")[0] not in libraries
    ]
    assert not foreign, foreign


def test_the_inside_of_transformers_is_known_to_few():
    wrong = [
        f"{name}:{line} imports {target}"
        for name in inner_modules()
        if part(name) not in INSIDERS
        for line, target in imports(name)
        if target.startswith("transformers.")
    ]
    assert not wrong, wrong


def test_the_modelling_file_beside_mapped_weights_needs_no_smelt():
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    found = {t for name in COPIED for _, t in imports(name)} - set(COPIED)
    foreign = {t for t in found if t.split(".")[0] not in allowed}
    assert not foreign, f"copied beside the weights, and imports {sorted(foreign)}"


def test_print_is_called_in_cli_only():
    wrong = [
        f"{name}:{node.lineno}"
        for name in modules()
        if part(name) != "cli"
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not wrong, f"print called in {wrong}: log it, or return it to cli.py"


# --- the files -----------------------------------------------------------------------------------


def test_no_file_names_a_folder_of_one_machine():
    # Absolute paths of a workplace mean nothing elsewhere. (Written so as not to find itself.)
    pattern = re.compile(rb"(?<![\w./:-])/(?:work|root|home/[a-z]\w*)/[\w.]")
    wrong = [
        f"{name}: {found[0].decode(errors='replace')}"
        for name in project_files()
        if (found := pattern.search((ROOT / name).read_bytes()))
    ]
    assert not wrong, wrong
