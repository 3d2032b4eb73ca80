"""What the drawings share: their style, lines with bands, heat maps, legends.

matplotlib (the extra `report`) is imported where it is used.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Value = dict[str, Any]
"""What analysis.json holds."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A")
"""Told apart by colour-blind readers. Source: Okabe & Ito 2008, without its yellow."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")


STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "normal",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "smelt",
    "figure.dpi": 100,
    "savefig.dpi": 150,
}


# --- what the drawings share ---------------------------------------------------------------------


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, laid out so that nothing overlaps."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def grid_of(count: int, *, most: int = 4) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    columns = min(count, most)
    return math.ceil(count / columns), columns


@dataclass(frozen=True)
class Look:
    """How a variant is drawn, everywhere."""

    colour: str
    marker: str
    line: str


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look per label; colours come again with another line after eight."""
    return {
        label: Look(
            COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i // len(COLOURS) % 4]
        )
        for i, label in enumerate(labels)
    }


def short(source: str) -> str:
    """A text source with the last two parts of its path only."""
    return "/".join(source.split("/")[-2:])


def floats(values: Sequence[Any]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Numbers as an array; null is nan."""
    return np.array(values, dtype=float)


def means(spreads: Sequence[Any]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The means of some `{mean, sd, n}`, nan where there is none."""
    return floats([None if one is None else one["mean"] for one in spreads])


def sds(spreads: Sequence[Any]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Their standard deviations, 0 where there is none."""
    return floats([0.0 if one is None or one["sd"] is None else one["sd"] for one in spreads])


def line(
    axes: "Axes", x: Any, mean: Any, sd: Any, look: Look, label: str, *, has_marks: bool = True
) -> None:
    """A line with a band of ± one standard deviation."""
    x, mean, sd = floats(x), floats(mean), floats(sd)
    axes.plot(
        x,
        mean,
        color=look.colour,
        linestyle=look.line,
        marker=look.marker if has_marks else None,
        label=label,
    )
    if np.any(sd > 0):
        axes.fill_between(x, mean - sd, mean + sd, color=look.colour, alpha=0.16, linewidth=0)


def legend(
    figure: "Figure", axes: "Sequence[Axes]", order: Iterable[str], *, most: int = 4
) -> None:
    """One legend for all panels, above them, its labels in the order given."""
    named: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    labels = [label for label in order if label in named]
    figure.legend(
        [named[label] for label in labels],
        labels,
        loc="outside upper left",
        ncols=min(len(labels), most),
        markerscale=1.3,
    )


def whole_ticks(axis: "Axis") -> None:
    """Ticks of an axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def log_ticks(axis: "Axis") -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, written out."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def panels(
    count: int, *, most: int = 4, width: float = 2.5, height: float = 2.4
) -> Iterator[tuple["Figure", list[Any]]]:
    """A figure and so many axes in a grid; those left over are gone."""
    rows, columns = grid_of(count, most=most)
    figure = new_figure(max(width * columns + 0.8, 4.0), height * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for left in axes[count:]:
        left.remove()
    yield figure, axes[:count]


def heat(
    axes: "Axes",
    matrix: Any,
    *,
    lowest: float,
    highest: float,
    colours: str,
    is_annotated: bool | None = None,
) -> Any:
    """A matrix in colours, row 0 on top; grey where there is no number."""
    import matplotlib

    values = np.ma.masked_invalid(floats(matrix))
    palette = matplotlib.colormaps[colours].with_extremes(bad="#d9d9d9")
    image = axes.imshow(values, vmin=lowest, vmax=highest, cmap=palette, aspect="auto")
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    whole_ticks(axes.xaxis)
    whole_ticks(axes.yaxis)
    small = values.shape[0] <= 8 and values.shape[1] <= 8
    if small if is_annotated is None else is_annotated:
        for (row, column), one in np.ndenumerate(floats(matrix)):
            if math.isfinite(one):
                red, green, blue, _ = palette(image.norm(one))
                is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                axes.text(
                    column,
                    row,
                    f"{one:.2f}",
                    ha="center",
                    va="center",
                    fontsize=6.5 if max(values.shape) > 5 else 7.5,
                    color="white" if is_dark else "#222222",
                )
    return image
