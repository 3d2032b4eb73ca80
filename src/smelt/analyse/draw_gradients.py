"""Figures of gradients: by block, per expert, over E, and between layers that share."""

from typing import TYPE_CHECKING, Any

import numpy as np

from smelt.analyse.figures import (
    Value,
    floats,
    heat,
    legend,
    line,
    log_ticks,
    looks,
    means,
    new_figure,
    panels,
    sds,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"experts": "experts", "router": "router", "attention": "attention", "dense": "dense FFN"}
MANY = 1500
"""Points from which a cloud is drawn as pixels: an element each would swell the page."""


def by_block(value: Value) -> "Figure | None":
    """Norm and SNR of every kind of parameters against the block."""
    variants = [one for one in value["variants"] if one["gradients"]]
    by_kind = {
        kind: {one["variant"]: _of_kind(one["gradients"], kind) for one in variants}
        for kind in KINDS
    }
    kinds = [kind for kind in KINDS if any(by_kind[kind].values())]
    if not kinds:
        return None
    look = looks([one["variant"] for one in value["variants"]])
    figure = new_figure(2.35 * len(kinds) + 0.8, 5.0)
    axes = figure.subplots(2, len(kinds), squeeze=False, sharex=True)
    for column, kind in enumerate(kinds):
        for row, name in enumerate(("norm", "snr")):
            axis = axes[row, column]
            for variant, parts in by_kind[kind].items():
                if not parts:
                    continue
                x = [part["block"] for part in parts]
                spreads = [part[name] for part in parts]
                line(axis, x, means(spreads), sds(spreads), look[variant], variant)
            whole_ticks(axis.xaxis)
        axes[0, column].set_title(KINDS[kind], loc="left")
        axes[0, column].set_yscale("log")
        log_ticks(axes[0, column].yaxis)
        axes[1, column].axhline(0, color="#444444", linewidth=0.8)
        axes[1, column].set_xlabel("block")
    axes[0, 0].set_ylabel("gradient norm")
    axes[1, 0].set_ylabel("signal / noise")
    legend(figure, axes.ravel().tolist(), look)
    return figure


def _of_kind(gradients: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The parts of a kind that lie in a block; of experts, what the block's layer sends."""
    parts = gradients["experts_by_layer"] if kind == "experts" else gradients["parts"]
    return [part for part in parts if part["kind"] == kind and part["block"] is not None]


def per_expert(value: Value) -> "Figure | None":
    """Every expert as a point: its tokens and its SNR."""
    runs = [one for one in value["runs"] if one["gradients"] and one["gradients"]["experts_stored"]]
    if not runs:
        return None
    look = looks([one["variant"] for one in value["variants"]])
    views = {"experts_by_layer": "one layer's share", "experts_stored": "stored expert, all layers"}
    figure = new_figure(8.2, 3.9)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, (name, title) in zip(axes, views.items(), strict=True):
        clouds: dict[str, list[Any]] = {}
        for run in runs:
            for part in run["gradients"][name]["parts"]:
                snr = floats(part["units"]["snr"])  # [E, P]
                tokens = np.broadcast_to(floats(part["tokens"])[:, None], snr.shape)
                clouds.setdefault(run["variant"], []).append((tokens.ravel(), snr.ravel()))
        count = sum(len(snr) for cloud in clouds.values() for _, snr in cloud)
        for variant, cloud in clouds.items():
            x, y = (np.concatenate(parts) for parts in zip(*cloud, strict=True))
            axis.scatter(
                x,
                y,
                s=14 if count < 400 else 7,
                color=look[variant].colour,
                marker=look[variant].marker,
                alpha=0.6,
                linewidths=0,
                label=variant,
                rasterized=count > MANY,
            )
        axis.set_title(title, loc="left")
        axis.set_xscale("log")
        log_ticks(axis.xaxis)
        axis.axhline(0, color="#444444", linewidth=0.8)
        axis.set_xlabel("tokens learnt from, all micro-batches")
    axes[0].set_ylabel("signal / noise, one micro-batch")
    legend(figure, list(axes), look)
    return figure


def over_experts(value: Value) -> "Figure | None":
    """Norm, SNR and tokens of a stored expert against E; None unless a line has two points."""
    lines: dict[str, list[Any]] = {}
    for one in value["variants"]:
        if one["gradients"] and one["gradients"]["per_stored_expert"]:
            lines.setdefault(one["without_experts"], []).append(one)
    if not any(len({one["num_experts"] for one in line}) > 1 for line in lines.values()):
        return None
    look = looks(list(lines))
    titles = {
        "norm": "gradient norm, one micro-batch",
        "snr": "signal / noise, one micro-batch",
        "tokens": "tokens learnt from, all micro-batches",
    }
    with panels(3, most=3, width=2.9, height=3.1) as (figure, axes):
        for axis, (name, title) in zip(axes, titles.items(), strict=True):
            for label, own in lines.items():
                _over_experts(axis, name, sorted(own, key=_experts), look[label], label)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({_experts(one) for own in lines.values() for one in own}))
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.xaxis.set_minor_formatter("")
            axis.set_xlabel("experts E")
            axis.set_ylabel(title)
            if name != "snr":
                axis.set_yscale("log")
                log_ticks(axis.yaxis)
        legend(figure, axes, look)
    return figure


def _experts(variant: dict[str, Any]) -> int:
    return int(variant["num_experts"])


def _over_experts(axis: "Axes", name: str, own: list[Any], look: Any, label: str) -> None:
    spreads = [one["gradients"]["per_stored_expert"][name] for one in own]
    axis.errorbar(
        [_experts(one) for one in own],
        means(spreads),
        yerr=sds(spreads),
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        capsize=2.5,
        label=label,
    )


def contributions(value: Value) -> "Figure | None":
    """Cosines between layers' contributions, of the first run of every variant that shares."""
    firsts: dict[str, Any] = {}
    for run in value["runs"]:
        if run["gradients"] and run["gradients"]["contributions"]:
            firsts.setdefault(run["variant"], run)
    if not firsts:
        return None
    with panels(len(firsts), most=4, width=2.45, height=2.5) as (figure, axes):
        image: Any = None
        for axis, (variant, run) in zip(axes, firsts.items(), strict=True):
            groups = run["gradients"]["contributions"]
            image = heat(axis, _together(groups), lowest=-1, highest=1, colours="RdBu_r")
            ratios = ", ".join(f"{group['alignment']:.2f}" for group in groups)
            axis.set_title(f"{variant}\nalignment {ratios}", loc="left", fontsize=8.5)
            axis.set_xlabel("MoE layer")
            axis.set_ylabel("MoE layer")
        figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    return figure


def _together(groups: list[dict[str, Any]]) -> Any:
    """The groups' matrices in one of all layers; nan between layers that share nothing."""
    size = 1 + max(layer for group in groups for layer in group["layers"])
    matrix = np.full((size, size), np.nan)
    for group in groups:
        places = np.array(group["layers"])
        matrix[np.ix_(places, places)] = floats(group["cosine"])
    return matrix
