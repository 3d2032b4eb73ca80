"""The shape of the project is a law like any other: imports, the tree, recipes, commands."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "smelt"

ORDER = (
    ("errors",),
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


@cache
def project_files() -> tuple[Path, ...]:
    """The project's files relative to its root: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = {Path(name) for name in listed.stdout.decode().split("\0") if name}
    else:  # not a clone: an unpacked archive holds what was tracked
        names = {path.relative_to(ROOT) for path in ROOT.rglob("*")}
        made = {"build", "dist", "runs", "__pycache__"}
        names = {n for n in names if not any(p in made or p.startswith(".") for p in n.parts)}
    return tuple(sorted(name for name in names if (ROOT / name).is_file()))


def test_no_file_names_a_folder_of_one_machine():
    # Absolute paths of a workplace mean nothing elsewhere. (Written so as not to find itself.)
    pattern = re.compile(rb"(?<![\w./:-])/(?:work|root|home/[a-z]\w*)/[\w.]")
    wrong = [
        f"{name}: {found[0].decode(errors='replace')}"
        for name in project_files()
        if (found := pattern.search((ROOT / name).read_bytes()))
    ]
    assert not wrong, wrong


# --- the tree in CONTRIBUTING.md -----------------------------------------------------------------


@cache
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@cache
def drawn_tree() -> str:
    return tree_block((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def tree_block(text: str) -> str:
    """The fenced block under the heading "The tree"."""
    section = re.search(r"^#+ The tree\s*$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, 'CONTRIBUTING.md has no heading "The tree"'
    block = re.search(r"^```\w*\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    assert block, 'CONTRIBUTING.md: no fenced block under "The tree"'
    return block[1]


def tree_paths(block: str) -> list[str]:
    """The paths that a drawn tree lists, relative to its root; folders end with "/".

    The first line is the root. On every other line each level is four columns of "│   ", "├── ",
    "└── " or blanks; then a name, or several siblings joined by " · "; then, after two blanks or
    more, a comment. A folder's name ends with "/". A name may hold "*".
    """
    paths: list[str] = []
    folders: list[str] = []
    for line in block.splitlines()[1:]:
        drawn = re.match(r"[│├└─ ]*", line)
        assert drawn is not None
        rest = line[drawn.end() :]
        if not rest:
            continue
        depth = len(drawn[0]) // 4
        assert depth >= 1 and len(drawn[0]) % 4 == 0, f"not drawn in fours: {line!r}"
        assert depth <= len(folders) + 1, f"deeper than its folder: {line!r}"
        del folders[depth - 1 :]
        names = re.split(r"\s{2,}", rest)[0].strip().split(" · ")
        paths += ["".join(folders) + name for name in names]
        folders += [name for name in names[-1:] if name.endswith("/")]
    return paths


def test_the_tree_parser_reads_what_it_documents():
    block = (
        "smelt/\n"
        "├── README.md · LICENSE   what it is\n"
        "├── src/smelt/            the package\n"
        "│   ├── errors.py\n"
        "│   └── compress/\n"
        "│       └── plan.py · apply.py\n"
        "└── recipes/compress/*.yaml\n"
    )
    assert tree_paths(block) == [
        "README.md",
        "LICENSE",
        "src/smelt/",
        "src/smelt/errors.py",
        "src/smelt/compress/",
        "src/smelt/compress/plan.py",
        "src/smelt/compress/apply.py",
        "recipes/compress/*.yaml",
    ]


def test_all_that_the_tree_lists_exists():
    missing = []
    for path in tree_paths(drawn_tree()):
        found = [hit for hit in ROOT.glob(path.rstrip("/")) if hit.is_dir() == path.endswith("/")]
        if not found:
            missing.append(path)
    assert not missing, f"listed in the tree, and not there: {missing}"


def test_all_that_exists_is_in_the_tree():
    paths = [Path(path) for path in tree_paths(drawn_tree())]
    # A folder is listed by a line of its own or as part of a longer path.
    listed = {place.as_posix() for path in paths for place in (path, *path.parents)}
    due = set()
    for path in project_files():
        top = path.parts[0]
        if len(path.parts) > 1 and not top.startswith("."):
            due.add(top)
        if path.parts[:2] == ("src", "smelt") and len(path.parts) > 3:
            due.add("/".join(path.parts[:3]))
        if path.parts[:2] == ("src", "smelt") and path.suffix == ".py":
            due.add(path.as_posix())
    due = {path for path in due if not path.endswith("/__init__.py")}  # implied by its folder
    assert not due - listed, f"not in the tree of CONTRIBUTING.md: {sorted(due - listed)}"


# --- recipes -------------------------------------------------------------------------------------

RECIPES = {
    "compress": ("smelt.recipe", "CompressRecipe"),
    "train": ("smelt.train.settings", "TrainRecipe"),
    "tasks": ("smelt.train.settings", "TrainRecipe"),
    "heal": ("smelt.train.heal_settings", "HealRecipe"),
    "study": ("smelt.study.settings", "StudyRecipe"),
}
"""What the YAML files of each folder under recipes/ are."""


@cache
def recipe_files() -> tuple[Path, ...]:
    return tuple(name for name in project_files() if name.parts[0] == "recipes")


def test_every_recipe_is_a_yaml_file_in_a_known_folder():
    wrong = [p for p in recipe_files() if p.suffix != ".yaml" or p.parts[1] not in RECIPES]
    assert not wrong, f"{wrong}: a recipe is a .yaml file under recipes/{{{','.join(RECIPES)}}}"


@pytest.mark.parametrize("path", recipe_files(), ids=str)
def test_every_recipe_parses_and_reads_back_as_it_was_written(path, tmp_path):
    from smelt.settings import dump_recipe, load_recipe

    module, name = RECIPES[path.parts[1]]
    if re.search(r"^kind: comparison$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE):
        module, name = "smelt.comparison.settings", "ComparisonRecipe"
    if re.search(r"^kind: operators$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE):
        module, name = "smelt.operators.settings", "OperatorsRecipe"
    settings = getattr(importlib.import_module(module), name)
    recipe = load_recipe(ROOT / path, settings)
    dump_recipe(recipe, tmp_path / "written.yaml")
    assert load_recipe(tmp_path / "written.yaml", settings) == recipe


# --- the README's commands -----------------------------------------------------------------------


def readme_commands(text: str) -> list[list[str]]:
    """The commands of the README's ```bash blocks whose first line is the comment "# tested"."""
    commands = []
    for block in re.findall(r"^```bash\n# tested\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):  # NAME=value before a command
                words = words[1:]
            if words:
                commands.append(words)
    return commands


def test_the_command_parser_reads_what_it_documents():
    text = (
        "```bash\n# tested\nmake demo   # first\n"
        "A=1 smelt compress src dst \\\n  --experts 64\n```\n"
        "```bash\nsmelt nothing\n```\n"
    )
    assert readme_commands(text) == [
        ["make", "demo"],
        ["smelt", "compress", "src", "dst", "--experts", "64"],
    ]


def test_the_readme_has_commands_to_test():
    assert readme_commands(readme())


@pytest.mark.parametrize("words", readme_commands(readme()), ids=" ".join)
def test_the_readme_commands_exist_with_their_flags(words):
    program, *rest = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif program == "smelt":
        check_smelt_command(rest)
    else:
        assert program in {"git", "cd", "pip", "python", "export"}, f"unknown program: {program}"


def check_smelt_command(words: list[str]) -> None:
    """Hold the words after `smelt` against the command line's own declarations."""
    import typer

    from smelt.cli import app

    command = typer.main.get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"smelt has no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    known = {"--help"} | {
        name for param in command.params for name in (*param.opts, *param.secondary_opts)
    }
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= known, f"{command.name} has no {sorted(used - known)}; it has {sorted(known)}"
