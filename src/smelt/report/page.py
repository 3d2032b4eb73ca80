"""The page: sections as HTML, with their figures' data, plotly.js and nothing to load."""

import base64
import gzip
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from smelt.errors import RecipeError
from smelt.evaluate.results import cell
from smelt.report.blocks import Block, Cards, Section, Table

_NUMBER_STARTS = frozenset("0123456789-−∞+")


def render(found: Sequence[Section], plans: dict[str, Any], *, title: str, subtitle: str) -> str:
    """The whole page as text.

    Args:
        plans: by their ids, what the views of plans are drawn from.
    """
    figures = [figure for section in found for figure in section.figures()]
    data = {
        "figures": {one.name: one.spec for one in figures if one.spec is not None},
        "views": {one.name: one.view for one in figures if one.view is not None},
        "plans": plans,
    }
    cards = [b for section in found for b in section.blocks if isinstance(b, Cards)]
    bundle, plotly_version = plotly_bundle()
    template = _environment().from_string(_own("page.html"))
    return template.render(
        title=title,
        subtitle=subtitle,
        version=version("smelt"),
        date=datetime.now(UTC).date().isoformat(),
        sections=found,
        number_of_cards=len(cards),
        css=_own("page.css"),
        js=_own("page.js"),
        data=_json(data),
        plotly=bundle,
        plotly_version=plotly_version,
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {"cell": cell_text, "kind_of": _kind, "right_of": right_aligned}
    return environment


def _kind(block: Block) -> str:
    return type(block).__name__


def cell_text(value: Any) -> str:
    """A value as a table on the page shows it."""
    return cell(value).replace("\\|", "|")


def right_aligned(table: Table) -> frozenset[int]:
    """The columns of numbers, or of texts that begin with one."""
    return _right(table.rows, len(table.columns))


@cache
def _right(rows: tuple[tuple[Any, ...], ...], count: int) -> frozenset[int]:
    def is_number(value: Any) -> bool:
        return not isinstance(value, str) or value[:1] in _NUMBER_STARTS

    held = {i: [row[i] for row in rows if row[i] not in (None, "")] for i in range(1, count)}
    return frozenset(i for i, values in held.items() if values and all(map(is_number, values)))


def _json(value: Any) -> Markup:
    """JSON that can stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _own(name: str) -> str:
    return files("smelt.report").joinpath(name).read_text(encoding="utf-8")


@cache
def plotly_bundle() -> tuple[str, str]:
    """plotly.js as it comes with plotly's Python package, packed as base64; and its version.

    Raises:
        RecipeError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs, get_plotlyjs_version
    except ImportError:
        raise RecipeError(
            "The figures of a report need plotly, which is not installed: "
            "pip install 'smelt[report]'. `smelt report … --markdown` needs none."
        ) from None
    packed = gzip.compress(get_plotlyjs().encode("utf-8"), 9, mtime=0)
    return base64.b64encode(packed).decode("ascii"), str(get_plotlyjs_version())
