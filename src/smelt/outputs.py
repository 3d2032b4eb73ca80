"""Where something is to be written: looked at before the work, written at once or not at all."""

import contextlib
import tempfile
from pathlib import Path

from smelt.errors import RecipeError, SmeltError


def check_new(place: str | Path, what: str = "file") -> Path:
    """A place where nothing is yet and something can be: found out before the work, not after it.

    Args:
        place: of the file or folder to come.
        what: it is, for the message.

    Raises:
        RecipeError: something is there already, or nothing can be written there.
    """
    place = Path(place).expanduser()
    if place.exists():
        raise RecipeError(f"{place}: exists. smelt overwrites nothing: name another {what}.")
    check_writable(place, what)
    return place


def check_writable(place: Path, what: str = "file") -> None:
    """Where nothing can be written is a RecipeError; by trying, since modes do not tell it all."""
    parent = next(one for one in place.absolute().parents if one.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise RecipeError(
            f"{place}: cannot be written ({parent}: {error.strerror}). Name another {what}."
        ) from None


def write_text(place: Path, text: str) -> None:
    """Write a file and the folders above it; a reader never sees half of it.

    Raises:
        SmeltError: it cannot be written.
    """
    part = place.with_name(place.name + ".part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise SmeltError(f"{place}: cannot be written ({error}).") from None
