"""The command that compares what was measured at different times: `compare`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from smelt.cli import measured, options
from smelt.cli.screen import Screen
from smelt.errors import RecipeError


def compare(
    files: Annotated[
        list[Path], typer.Argument(help="Files of `smelt evaluate --items`, or of -o, not both.")
    ],
    seed: options.Seed = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare checkpoints that were measured at different times, on the same items.

    Of files of items: each checkpoint less the first one, with a 95 % interval and a p-value by
    paired bootstrap. Of files of results: one table. What was not measured alike (items, prompts,
    examples, harness) is refused, and so is a file that was edited.

    Example: smelt compare original.items.json half.items.json
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    from smelt.evaluate import results
    from smelt.evaluate.item_files import holds_items, load_answers
    from smelt.evaluate.paired import compare_answers

    kinds = {holds_items(file) for file in files}
    if len(kinds) > 1:
        raise RecipeError(
            "Files of items (--items) and of results (-o) do not compare. Give one kind of them."
        )
    if kinds == {True}:
        answers = [(file, one) for file in files for one in load_answers(file)]
        names = _apart([(file, one.name) for file, one in answers])
        named = [replace(one, name=name) for name, (_, one) in zip(names, answers, strict=True)]
        found = compare_answers(named, seed=seed or 0)
        rows = measured.paired_rows(found)
        screen.result({"differences": rows}, results.markdown(rows))
        return
    read = [(file, one) for file in files for one in results.load(file)]
    results.check_one_harness([one for _, one in read])
    owners = list(dict.fromkeys((file, one.checkpoint, one.fingerprint) for file, one in read))
    names = _apart([owner[:2] for owner in owners])
    titles = dict(zip(owners, names, strict=True))
    every = [(titles[file, one.checkpoint, one.fingerprint], one) for file, one in read]
    table = results.markdown(measured.result_rows(every, results.cell))
    note = "- no p-values: these files hold no items (smelt evaluate --items)\n"
    screen.result({"results": [vars(one) for _, one in read]}, table + note)


def _apart(owners: Sequence[tuple[Path, str]]) -> list[str]:
    """What to call checkpoints: by name, by file too where names are not enough, and by place."""
    names = [name for _, name in owners]
    if len(set(names)) < len(names):
        names = [f"{name} ({file.name})" for file, name in owners]
    if len(set(names)) < len(names):
        names = [f"{name} {place}" for place, name in enumerate(names, 1)]
    return names
