"""What a name in a recipe stands for: a row of one of our tables, or outside code."""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

from smelt.errors import RecipeError

T = TypeVar("T")


def find(table: Mapping[str, T], name: str, setting: str) -> T:
    """The entry of `table` that `name` stands for.

    Args:
        table: ours, by name.
        name: a name in the table, or `"module:function"` for outside code, imported here.
        setting: what the recipe calls it, for the error.
    """
    if name in table:
        return table[name]
    if ":" in name:
        found: T = _outside(name, setting)
        return found
    close = get_close_matches(name, table, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise RecipeError(
        f"{setting} = {name!r}: there is no such name.{hint} The names are: {', '.join(table)}; "
        '"module:function" takes outside code.'
    )


def _outside(name: str, setting: str) -> Any:
    """The object that `module:function` names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, ValueError) as error:
        raise RecipeError(
            f"{setting} = {name!r}: the module {module!r} cannot be imported ({error}). "
            "Install it, or put its folder on PYTHONPATH."
        ) from None
    except AttributeError:
        raise RecipeError(
            f"{setting} = {name!r}: the module {module!r} holds no {attribute!r}."
        ) from None
