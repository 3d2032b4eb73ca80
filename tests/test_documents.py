"""What documents say is there: the drawn tree, the recipes, the README's commands."""

import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from project import ROOT, project_files

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
