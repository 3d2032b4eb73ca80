"""Figures out of logs: loss, balance, the time of a step."""

from typing import TYPE_CHECKING, Any

import numpy as np

from smelt.analyse.curves import QUANTITIES
from smelt.analyse.figures import Value, floats, legend, line, looks, new_figure, panels, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLOURS = {
    "experts": "#0072B2",
    "mixing": "#56B4E9",
    "router": "#009E73",
    "dispatch": "#8FCFB8",
    "attention": "#D55E00",
    "dense": "#E69F00",
    "head": "#CC79A7",
    "optimizer": "#4D4D4D",
    "shares": "#737373",
    "data": "#999999",
    "other": "#CCCCCC",
}


def loss(value: Value) -> "Figure | None":
    """Training and held-out loss."""
    variants = [one for one in value["variants"] if one["curves"]]
    sources = dict.fromkeys(s for one in variants for s in one["curves"].get("held_out", {}))
    wanted: list[tuple[str, Any]] = [
        ("training", lambda curves: curves.get("nats")),
        *((f"held out: {short(s)}", lambda c, s=s: c.get("held_out", {}).get(s)) for s in sources),
    ]
    wanted = [(title, read) for title, read in wanted if any(read(v["curves"]) for v in variants)]
    if not wanted:
        return None
    with panels(len(wanted), most=3, width=3.6, height=3.0) as (figure, axes):
        for axis, (title, read) in zip(axes, wanted, strict=True):
            axis.set_title(title, loc="left")
            axis.set_ylabel("nats per token")
            _draw(axis, value, read)
        legend(figure, axes, [one["variant"] for one in value["variants"]])
    return figure


def balance(value: Value) -> "Figure | None":
    """Balance, entropy, dropped choices, gradient norm."""
    names = ("balance", "routing_entropy", "dropped", "gradient_norm")
    there = [n for n in names if any(n in one["curves"] for one in value["variants"])]
    if not there:
        return None
    with panels(len(there), most=2, width=3.6, height=2.5) as (figure, axes):
        for axis, name in zip(axes, there, strict=True):
            axis.set_ylabel(QUANTITIES[name][1])
            _draw(axis, value, lambda curves, name=name: curves.get(name))
        legend(figure, axes, [one["variant"] for one in value["variants"]])
    return figure


def _draw(axis: "Axes", value: Value, read: Any) -> None:
    """A curve of every variant against tokens, or steps where no run says how many tokens."""
    look = looks([one["variant"] for one in value["variants"]])
    known = [one for one in value["variants"] if one["curves"] and read(one["curves"])]
    has_tokens = all(one["tokens_per_step"] for one in known)

    def place(one: Value) -> Any:
        steps = floats(read(one["curves"])["step"])
        return steps * one["tokens_per_step"] if has_tokens else steps

    unit, scale = _unit(max(place(one)[-1] for one in known))
    is_end_only = all(len(place(one)) == 1 for one in known)
    for number, one in enumerate(known):
        curve, own = read(one["curves"]), look[one["variant"]]
        sd = floats([s or 0.0 for s in curve["sd"]])
        if is_end_only:
            bars: Any = {
                "color": own.colour,
                "marker": own.marker,
                "capsize": 3,
                "linestyle": "none",
            }
            axis.errorbar([number], curve["mean"], yerr=sd, label=one["variant"], **bars)
            continue
        x = place(one) / scale
        line(axis, x, curve["mean"], sd, own, one["variant"], has_marks=len(x) < 12)
    if is_end_only:  # side by side: there is nothing to draw against
        axis.set_xticks([])
        axis.margins(x=0.1)
    else:
        axis.set_xlabel(f"{'tokens' if has_tokens else 'steps'}{unit}")


def _unit(most: float) -> tuple[str, float]:
    for unit, scale in ((", billions", 1e9), (", millions", 1e6), (", thousands", 1e3)):
        if most >= 2 * scale:
            return unit, scale
    return "", 1.0


def phases(value: Value) -> "Figure | None":
    """Milliseconds of a step, stacked by phase, a bar per variant."""
    variants = [one for one in value["variants"] if one["curves"].get("phases")]
    if not variants:
        return None
    names = dict.fromkeys(name for one in variants for name in one["curves"]["phases"])
    order = [n for n in PHASE_COLOURS if n in names] + [n for n in names if n not in PHASE_COLOURS]
    figure = new_figure(8.0, 0.42 * len(variants) + 1.5)
    axis = figure.subplots()
    y = np.arange(len(variants))
    left = np.zeros(len(variants))
    for name in order:
        width = floats([one["curves"]["phases"].get(name, {"mean": 0})["mean"] for one in variants])
        colour = PHASE_COLOURS.get(name, "#8C510A")
        axis.barh(y, width, left=left, height=0.66, color=colour, label=name, linewidth=0)
        left = left + width
    for row, total in zip(y, left, strict=True):
        axis.text(float(total), float(row), f" {total:.3g}", va="center", fontsize=8.5)
    axis.set_yticks(y, [one["variant"] for one in variants])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds per step")
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.08)
    legend(figure, [axis], order, most=5)
    return figure
