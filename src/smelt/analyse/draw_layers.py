"""Figures of layers: α and β, and how alike layers are."""

from typing import TYPE_CHECKING, Any

import numpy as np

from smelt.analyse.figures import (
    LINES,
    Value,
    floats,
    heat,
    legend,
    line,
    looks,
    means,
    new_figure,
    panels,
    sds,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SEEDS = 5
"""Seeds of a variant whose α is drawn; all are in the numbers."""


def alphas(value: Value) -> "Figure | None":
    """α of every run: rows of panels are variants, columns seeds."""
    by_variant: dict[str, list[Any]] = {}
    for run in value["runs"]:
        if run["mixing"] and "alpha" in run["mixing"]:
            by_variant.setdefault(run["variant"], []).append(run)
    if not by_variant:
        return None
    columns = min(max(map(len, by_variant.values())), MOST_SEEDS)
    shown = [run for runs in by_variant.values() for run in runs[:columns]]
    limit = max(float(np.abs(floats(r["mixing"]["alpha"]["values"])).max()) for r in shown)
    figure = new_figure(max(1.9 * columns + 1.4, 4.2), 2.5 * len(by_variant) + 0.3)
    axes = figure.subplots(len(by_variant), columns, squeeze=False)
    image: Any = None
    for row, (variant, runs) in enumerate(by_variant.items()):
        for column, axis in enumerate(axes[row]):
            if column >= len(runs):
                axis.remove()
                continue
            run = runs[column]
            image = _alpha(axis, run["mixing"], limit)
            seed = "" if run["seed"] is None else f"seed {run['seed']}"
            axis.set_title(
                f"{variant}\n{seed}" if column == 0 else f"\n{seed}", loc="left", fontsize=8.5
            )
            axis.set_ylabel("block" if column == 0 else "")
    figure.colorbar(image, ax=axes.ravel().tolist(), label="α", shrink=0.7)
    return figure


def _alpha(axis: Any, mixing: dict[str, Any], limit: float) -> Any:
    values = floats(mixing["alpha"]["values"])  # [L, P, C]
    L, P, num_columns = values.shape
    image = heat(
        axis, values.reshape(L, P * num_columns), lowest=-limit, highest=limit, colours="RdBu_r"
    )
    for entry in range(1, P):
        axis.axvline(entry * num_columns - 0.5, color="white", linewidth=2)
    axis.set_xticks(
        [(entry + 0.5) * num_columns - 0.5 for entry in range(P)], [str(c) for c in range(P)]
    )
    scope = {1: "", 2: " (each: up, down)", 3: " (each: up, gate, down)"}
    axis.set_xlabel("pool entry" + scope.get(num_columns, " (each: by expert)"), fontsize=8)
    axis.set_yticks(range(L), [str(block) for block in mixing["blocks"]])
    return image


def mixing(value: Value) -> "Figure | None":
    """Distance from one-hot by layer, effective rank, β by layer."""
    variants = [one for one in value["variants"] if one["mixing"]]
    if not variants:
        return None
    look = looks([one["variant"] for one in value["variants"]])
    with_alpha = [one for one in variants if one["mixing"]["distance_from_one_hot"]]
    with_beta = [one for one in variants if one["mixing"]["beta"]]
    count = 2 * bool(with_alpha) + bool(with_beta)
    with panels(count, most=3, width=2.9, height=3.0) as (figure, axes):
        left = list(axes)
        if with_alpha:
            _distance(left.pop(0), with_alpha, look)
            _rank(left.pop(0), with_alpha, look)
        if with_beta:
            axis = left.pop(0)
            for one in with_beta:
                spreads = one["mixing"]["beta"]
                x = one["mixing"]["blocks"]
                line(axis, x, means(spreads), sds(spreads), look[one["variant"]], one["variant"])
            axis.axhline(1, color="#444444", linewidth=0.8)
            axis.set_xlabel("block")
            axis.set_ylabel("β")
            whole_ticks(axis.xaxis)
        legend(figure, axes, look)
    return figure


def _distance(axis: Any, variants: list[Any], look: Any) -> None:
    for one in variants:
        spreads, own = one["mixing"]["distance_from_one_hot"], look[one["variant"]]
        x = one["mixing"]["blocks"]
        line(axis, x, means(spreads), sds(spreads), own, one["variant"])
    for farthest in {one["mixing"]["farthest_from_one_hot"] for one in variants}:
        axis.axhline(farthest, color="#444444", linewidth=0.9, linestyle="--")
    axis.set_ylim(bottom=-0.01)
    axis.set_xlabel("block")
    axis.set_ylabel("distance of α from one-hot")
    whole_ticks(axis.xaxis)


def _rank(axis: Any, variants: list[Any], look: Any) -> None:
    for place, one in enumerate(variants):
        rank, own = one["mixing"]["effective_rank"], look[one["variant"]]
        axis.errorbar(
            place,
            rank["mean"],
            yerr=rank["sd"] or 0,
            color=own.colour,
            marker=own.marker,
            capsize=3,
        )
        highest = one["mixing"]["highest_rank"]
        axis.plot([place - 0.3, place + 0.3], [highest] * 2, color="#444444", ls="--", lw=0.9)
    axis.set_xlim(-0.6, len(variants) - 0.4)
    axis.set_ylim(0.95, 1.08 * max(one["mixing"]["highest_rank"] for one in variants))
    axis.set_xticks([])
    axis.set_ylabel("effective rank of α (dashed: highest)")


def history(value: Value) -> "Figure | None":
    """|α| during training, of the first run of every variant that has it."""
    firsts: dict[str, Any] = {}
    for run in value["runs"]:
        alpha = (run["mixing"] or {}).get("alpha")
        if alpha and alpha["history"] and len(alpha["history"]["steps"]) > 1:
            firsts.setdefault(run["variant"], run)
    if not firsts:
        return None
    import matplotlib

    palette = matplotlib.colormaps["viridis"]
    with panels(len(firsts), most=3, width=3.0, height=2.7) as (figure, axes):
        for axis, (variant, run) in zip(axes, firsts.items(), strict=True):
            alpha = run["mixing"]["alpha"]
            past, is_down = alpha["history"], alpha["columns"][-1] == "down"
            values = np.abs(floats(past["values"]))  # [steps, L, P] or [steps, L, P, columns]
            values = values.reshape(*values.shape[:3], -1)
            values = values[..., -1] if is_down else values.mean(-1)
            for layer in range(values.shape[1]):
                colour = palette(0.92 * layer / max(values.shape[1] - 1, 1))
                for entry in range(values.shape[2]):
                    axis.plot(
                        past["steps"],
                        values[:, layer, entry],
                        color=colour,
                        linestyle=LINES[entry % len(LINES)],
                        linewidth=1.2,
                    )
            axis.set_title(variant, loc="left", fontsize=8.5)
            axis.set_xlabel("step")
            axis.set_ylabel("|α| of the down projection" if is_down else "|α|")
        most = max(len(run["mixing"]["alpha"]["values"]) for run in firsts.values())
        _key(figure, axes, palette, most, max(_entries(run) for run in firsts.values()))
    return figure


def _entries(run: dict[str, Any]) -> int:
    return len(run["mixing"]["alpha"]["values"][0])


def _key(figure: "Figure", axes: Any, palette: Any, layers: int, entries: int) -> None:
    """Colours are layers, line styles entries."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.lines import Line2D

    colours = ListedColormap([palette(0.92 * i / max(layers - 1, 1)) for i in range(layers)])
    shades = ScalarMappable(BoundaryNorm(np.arange(layers + 1) - 0.5, layers), colours)
    bar = figure.colorbar(shades, ax=axes, label="MoE layer", shrink=0.8)
    bar.set_ticks([0, layers - 1])
    styles: Any = LINES
    handles = [
        Line2D([], [], color="#444444", linestyle=styles[c % len(LINES)], label=f"entry {c}")
        for c in range(min(entries, len(LINES)))
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


# --- how alike layers are ------------------------------------------------------------------------


def cka(value: Value) -> "Figure | None":
    """CKA between blocks, mean over seeds."""
    lowest = min((np.nanmin(floats(m)) for m in _of_variants(value, "cka").values()), default=0.0)
    limits = (np.floor(10 * lowest) / 10, 1.0)
    return _matrices(value, "cka", "linear CKA", limits, "blocks passed (0: embeddings)")


def output_cosine(value: Value) -> "Figure | None":
    """Cosine between MoE layers' outputs, mean over seeds."""
    return _matrices(value, "output_cosine", "cosine of outputs", (-1.0, 1.0), "MoE layer")


def mutual_information(value: Value) -> "Figure | None":
    """Normalised mutual information of routings, mean over seeds; the diagonal is 1."""
    beside = [
        floats(m)[~np.eye(len(m), dtype=bool)]
        for m in _of_variants(value, "mutual_information").values()
    ]
    highest = max((float(np.nanmax(one, initial=0.0)) for one in beside), default=1.0)
    limits = (0.0, min(max(np.ceil(10 * highest) / 10, 0.1), 1.0))
    return _matrices(value, "mutual_information", "mutual information", limits, "MoE layer")


def _of_variants(value: Value, name: str) -> dict[str, Any]:
    """A matrix per variant that has it and more than one row."""
    named = {one["variant"]: (one["similarity"] or {}).get(name) for one in value["variants"]}
    return {v: found["mean"] for v, found in named.items() if found and len(found["mean"]) > 1}


def _matrices(
    value: Value, name: str, label: str, limits: tuple[float, float], axis_label: str
) -> "Figure | None":
    matrices = _of_variants(value, name)
    if not matrices:
        return None
    lowest, highest = limits
    colours = "cividis" if lowest >= 0 else "RdBu_r"
    with panels(len(matrices), most=4, width=2.45, height=2.45) as (figure, axes):
        image: Any = None
        for axis, (variant, matrix) in zip(axes, matrices.items(), strict=True):
            image = heat(axis, matrix, lowest=lowest, highest=highest, colours=colours)
            axis.set_title(variant, loc="left", fontsize=8.5)
            axis.set_xlabel(axis_label)
            axis.set_ylabel(axis_label)
        extend = "max" if highest < 1 else "neither"
        figure.colorbar(image, ax=axes, label=label, shrink=0.8, extend=extend)
    return figure


def load(value: Value) -> "Figure | None":
    """Choices per expert in units of an even load, of the first run of every variant."""
    firsts: dict[str, Any] = {}
    for run in value["runs"]:
        if run["gradients"] and run["gradients"]["tokens_per_expert"]:
            firsts.setdefault(run["variant"], run)
    if not firsts:
        return None
    with panels(len(firsts), most=4, width=2.45, height=2.2) as (figure, axes):
        image: Any = None
        for axis, (variant, run) in zip(axes, firsts.items(), strict=True):
            image = heat(
                axis,
                _loads(run["gradients"]["tokens_per_expert"]),
                lowest=0,
                highest=2,
                colours="cividis",
            )
            axis.set_title(variant, loc="left", fontsize=8.5)
            axis.set_xlabel("expert, by load")
            axis.set_ylabel("MoE layer")
        figure.colorbar(image, ax=axes, label="load (1: even)", shrink=0.8, extend="max")
    return figure


def _loads(counts: list[list[int]]) -> Any:
    """Loads [L, E], the highest first; nan where a layer has fewer experts than another."""
    loads = np.full((len(counts), max(map(len, counts))), np.nan)
    for row, layer in zip(loads, counts, strict=True):
        own = np.sort(floats(layer))[::-1]
        row[: len(own)] = own * len(own) / max(own.sum(), 1)
    return loads
