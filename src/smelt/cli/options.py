"""Options that several commands have, and how they become a recipe."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from smelt.errors import RecipeError
from smelt.recipe import CalibrationRecipe, CompressRecipe, nest
from smelt.settings import Settings, check_recipe, override_value, read_values

SettingsT = TypeVar("SettingsT", bound=Settings)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report.")]
Source = Annotated[str, typer.Argument(help="A checkpoint folder, or a hub id such as org/name.")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Text: a file, folder, glob, .jsonl, datasets id, or python[:train|held-out|all]"
        "[:code|prose]. Repeat to mix; TEXT=0.3 gives it a weight.",
    ),
]
Tokens = Annotated[int | None, typer.Option("--tokens", help="How many tokens of text.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the text drawn, and of all else.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting of the recipe: name=value or group.name=value."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code that comes with the checkpoint.")
]
Verify = Annotated[
    bool,
    typer.Option(
        help="Compare the weights with their SHA-256 checksums first, where these are known."
    ),
]
Stats = Annotated[
    str | None,
    typer.Option("--stats", help="Statistics from `smelt calibrate`: used, not made again."),
]
Form = Annotated[str | None, typer.Option("--form", help="stock, mapped or expanded.")]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Alignment solves at a time [one per core].")
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A YAML file of settings.")]


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RecipeError(
            f"--experts {text}: not a whole number, such as 8. A share of them is --keep 0.5."
        ) from None


def share(option: str) -> dict[str, Any]:
    """For `typer.Option`: a number between 0 and 1 that people say in other ways too (50%)."""

    def parsed(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < (value := float(text)) <= 1:
                return value
        raise RecipeError(f"{option} {text}: not a share between 0 and 1, like 0.5.")

    return {"parser": parsed, "metavar": "<float>"}


COUNT: dict[str, Any] = {"parser": _count, "metavar": "<int>"}


def compress_recipe(
    file: Path | None, given: Mapping[str, Any], overrides: Sequence[str] | None
) -> CompressRecipe:
    """The recipe of a file, then of options, then of `--set`: the later ones win."""
    values: dict[str, Any] = {} if file is None else read_values(file, CompressRecipe)
    own = nest(_said(given))
    budgets = {"experts", "keep", "size"}
    if budgets & own.keys():  # a budget on the command line replaces the file's
        values = {name: value for name, value in values.items() if name not in budgets}
    if "rank" in own:
        values["decompose"] = (values.get("decompose") or {}) | {"rank": own.pop("rank")}
    if own.get("reconstruct") is True:  # the file may say how
        own["reconstruct"] = values.get("reconstruct") or {}
    group = {**(values.get("calibration") or {}), **own.pop("calibration", {})}
    values |= own | ({"calibration": group} if group else {})
    return _finish(values, overrides, CompressRecipe, file)


def text_recipe(
    given: Mapping[str, Any], overrides: Sequence[str] | None, **defaults: Any
) -> CalibrationRecipe:
    """Which text, and how much of it."""
    return _finish({**defaults, **_said(given)}, overrides, CalibrationRecipe, None)


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in given.items() if value not in (None, [], ())}


def _finish(
    values: dict[str, Any],
    overrides: Sequence[str] | None,
    cls: type[SettingsT],
    file: Path | None,
) -> SettingsT:
    for override in overrides or ():
        override_value(values, override)
    return check_recipe(values, cls, origin=str(file or "settings"))
