"""The parts a page is built of: words, tables, figures, in sections."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smelt.evaluate.results import cell


@dataclass(frozen=True)
class Table:
    """A table; cells are values (shown as `cell` does), the first column heads its rows."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    @classmethod
    def of(cls, caption: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> "Table":
        """From rows with names; a column without any value is left out."""
        names = list(dict.fromkeys(key for row in rows for key in row))
        names = [n for n in names if any(row.get(n) is not None for row in rows)]
        return cls(caption, tuple(names), tuple(tuple(r.get(n) for n in names) for r in rows), note)


@dataclass(frozen=True)
class Figure:
    """A figure: a plotly specification, or a view that the page draws from a plan.

    Colours are names, "@c1" or "@muted", that the page turns into those of its theme.
    """

    name: str  # the id on the page
    title: str
    finding: str  # the sentence a reader without the figure needs
    spec: Mapping[str, Any] | None = None  # data and layout
    view: Mapping[str, Any] | None = None  # kind and plan, of a view
    height: int = 360
    table: Table | None = None
    is_half: bool = False  # two stand side by side where there is room


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str
    is_small: bool = False


@dataclass(frozen=True)
class Code:
    """Something to be read as it stands: a recipe, commands."""

    title: str
    text: str


@dataclass(frozen=True)
class Card:
    """A headline number: what it is, before and after, and what that means."""

    name: str
    value: str
    before: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Cards:
    """Headline numbers of one run."""

    name: str
    cards: tuple[Card, ...]


Block = Text | Table | Figure | Code | Cards


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; its parts have headings one below it."""

    name: str  # the id on the page
    title: str
    blocks: tuple[Block, ...] = ()
    parts: tuple["Section", ...] = field(default_factory=tuple)

    def figures(self) -> list[Figure]:
        """All its figures, those of its parts too."""
        own = [block for block in self.blocks if isinstance(block, Figure)]
        return own + [figure for part in self.parts for figure in part.figures()]


# --- words for numbers ---------------------------------------------------------------------------


def size(num_bytes: float) -> str:
    """Bytes with a unit of thousands."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 100 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count(value: float) -> str:
    """A count with the letter of its thousands."""
    for unit in ("", " k", " M", " B"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}" if value < 100 else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.4g} T"


def with_error(value: float, error: float | None) -> str:
    """A value and its standard error with as many decimals as the error deserves."""
    if not math.isfinite(value):
        return "∞"
    if error is None or not error > 0 or not math.isfinite(error):
        return cell(float(value))
    if abs(value) >= 1e6:
        return f"{value:.2g} ± {error:.1g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def rounded(value: float | None) -> float | None:
    """Four significant digits; None where there is no number, as JSON has it."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def join(words: Sequence[str], last: str = "and") -> str:
    """Words as a sentence lists them."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def plural(number: int, word: str) -> str:
    """A number of things."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def slug(text: str) -> str:
    """A text as an id: letters, digits and hyphens."""
    kept = "".join(c if c.isalnum() and c.isascii() else "-" for c in text.lower())
    return "-".join(filter(None, kept.split("-"))) or "x"
