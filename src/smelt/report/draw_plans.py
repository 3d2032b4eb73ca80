"""Figures of plans: who is used, who joined whom, what that did to layers, what ranks are left."""

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from smelt.report.blocks import Figure, Table, plural, rounded, slug
from smelt.report.runs import Run
from smelt.report.told import group_sizes, member_similarities

Spec = dict[str, Any]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot")


def layout(x: str, y: str, **more: Any) -> Spec:
    """The layout all figures begin from: axis titles, and what a figure adds."""
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, **more}


def series(number: int) -> Spec:
    """The look of a line: colour, dash and symbol, so that no colour is alone in telling."""
    return {
        "line": {"color": f"@c{number % 8 + 1}", "dash": DASHES[number // 8 % 4], "width": 2},
        "marker": {"color": f"@c{number % 8 + 1}", "symbol": SYMBOLS[number % 8], "size": 7},
    }


def layer_layout(names: Sequence[str], y: str) -> Spec:
    """The layout of lines over MoE layers, which are told by their numbers in the model."""
    labels = [short_name(name) for name in names]
    step = max(1, math.ceil(len(names) / 16))
    shape = layout("layer", y)
    shape["xaxis"] |= {
        "tickvals": list(range(0, len(names), step)),
        "ticktext": labels[::step],
        "range": [-0.5, len(names) - 0.5],
        "zeroline": False,
    }
    return shape


def short_name(name: str) -> str:
    """The number of a layer in its model, or its name where that has none."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    side = "enc " if "encoder" in name else "dec " if "decoder" in name else ""
    return f"{side}{numbers[0]}" if numbers else name


def plan_data(run: Run) -> Spec:
    """What the views of a plan are drawn from."""
    assert run.plan is not None
    layers = []
    for layer in run.plan.layers:
        one: Spec = {
            "name": layer.name,
            "operator": layer.operator,
            "dominants": layer.dominants,
            "labels": layer.labels,
            "protected": layer.protected,
        }
        if layer.operator == "merge":
            one["weights"] = [rounded(w) for w in layer.weights]
            one["similarity"] = [rounded(s) for s in layer.similarity]
        if run.usage is not None and layer.name in run.usage.count:
            one["count"] = run.usage.count[layer.name]
            one["saliency"] = [rounded(s) for s in run.usage.saliency.get(layer.name, ())]
        layers.append(one)
    return {"run": run.name, "layers": layers}


def usage(run: Run) -> Figure | None:
    """Every expert's share of the choices, and what became of it."""
    if run.plan is None or run.usage is None:
        return None
    rows: list[Spec] = []
    lost: list[float] = []
    most = (0.0, "", 0)
    for layer in run.plan.layers:
        found = run.usage.count.get(layer.name)
        if not found or not sum(found) or len(found) != layer.num_experts:
            continue
        loads = [n * len(found) / sum(found) for n in found]
        stays = set(layer.dominants)
        gone = math.fsum(v for e, v in enumerate(loads) if e not in stays) / len(loads)
        if layer.operator != "keep":
            lost.append(gone)
        most = max(most, (max(loads), layer.name, loads.index(max(loads))))
        rows.append(
            {
                "layer": layer.name,
                "least load": min(loads),
                "median": median(loads),
                "most": max(loads),
                "busiest expert": loads.index(max(loads)),
                "experts never chosen": sum(n == 0 for n in found),
                "choices of experts that do not stay": f"{gone:.1%}",
            }
        )
    if not rows:
        return None
    unused = sum(row["experts never chosen"] for row in rows)
    words = (
        f"The busiest expert is {most[2]} of {most[1]} with {most[0]:.1f} times an even load; "
        f"{plural(unused, 'expert')} were never chosen in {run.usage.num_tokens:,} tokens."
    )
    if lost:
        words += (
            f" The experts that do not stay as they were had {fmean(lost):.0%} of the choices "
            "(mean over layers)."
        )
    table = Table.of("Load of experts by layer; 1 is an even share of the choices", rows)
    return Figure(
        f"usage-{slug(run.name)}",
        f"Expert usage by layer, {run.name}",
        words,
        view={"kind": "usage", "plan": slug(run.name)},
        height=160 + max(260, min(900, 22 * len(rows))) + 120,
        table=table,
    )


def members(run: Run) -> Figure | None:
    """The layer chosen by the reader: what becomes of each expert, who joins whom."""
    plan = run.plan
    if plan is None:
        return None
    changed = [layer for layer in plan.layers if layer.operator != "keep"]
    if not changed:
        return None
    sizes = [n for layer in changed for n in group_sizes(layer)]
    if plan.method.operator == "merge":
        alone = sum(n == 1 for n in sizes)
        words = (
            f"{len(sizes):,} groups in {plural(len(changed), 'layer')}: the largest has "
            f"{plural(max(sizes), 'member')}, and {alone:,} experts stay alone."
        )
    else:
        gone = sum(layer.num_experts - layer.num_groups for layer in changed)
        words = (
            f"{gone:,} of {sum(x.num_experts for x in changed):,} experts in "
            f"{plural(len(changed), 'layer')} do not stay."
        )
    return Figure(
        f"members-{slug(run.name)}",
        f"Who went where, layer by layer, {run.name}",
        words + " Choose a layer to see its experts; the table below the figure is of that layer.",
        view={"kind": "members", "plan": slug(run.name)},
        height=420,
    )


def similarity(runs: Sequence[Run]) -> Figure | None:
    """How alike merged experts are to the dominants they joined, by layer."""
    data: list[Spec] = []
    rows: list[Spec] = []
    said = []
    for run in runs:
        points = []
        for position, layer in enumerate(run.plan.layers if run.plan else ()):
            alike = member_similarities(layer)
            if alike:
                low, mid, high = min(alike), median(alike), max(alike)
                points.append((position, low, mid, high, layer.name))
                rows.append(
                    {
                        "run": run.name,
                        "layer": layer.name,
                        "members": len(alike),
                        "least": low,
                        "median": mid,
                        "most": high,
                    }
                )
        if not points:
            continue
        assert run.plan is not None
        said.append(
            f"{run.name}: {median(p[2] for p in points):.2f} ({run.plan.method.similarity}), the "
            f"least {min(p[1] for p in points):.2f}"
        )
        data.append(_median_line(run.name, points, len(data)))
    if not data:
        return None
    shape = layer_layout(list(dict.fromkeys(row["layer"] for row in rows)), "similarity")
    return Figure(
        "similarity",
        "How alike the merged experts are",
        "Median similarity of a merged expert to the dominant of its group, over layers: "
        + "; ".join(said)
        + ". Bars reach from the least to the most alike member of a layer.",
        {"data": data, "layout": shape},
        table=Table.of("Similarity of members to their dominant", rows),
    )


def _median_line(name: str, points: Sequence[tuple[Any, ...]], number: int) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [p[0] for p in points],
        "y": [rounded(p[2]) for p in points],
        "text": [p[4] for p in points],
        "hovertemplate": "%{text}<br>median %{y}<extra></extra>",
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [rounded(p[3] - p[2]) for p in points],
            "arrayminus": [rounded(p[2] - p[1]) for p in points],
            "color": f"@c{number % 8 + 1}",
            "thickness": 1,
            "width": 2,
        },
        **series(number),
    }


def errors(
    runs: Sequence[Run], measured: Mapping[str, Mapping[str, float]], names: Mapping[str, str]
) -> Figure | None:
    """The output error of each layer: as measured, and as the fits of the plan held it out."""
    lines: list[tuple[str, Mapping[str, float]]] = [
        (names.get(fingerprint, fingerprint[:8]), layers)
        for fingerprint, layers in measured.items()
    ]
    for run in runs:
        fits = {x.name: x.fit for x in run.plan.layers if x.fit} if run.plan else {}
        if fits:
            lines.append((f"{run.name}, before its fit", {n: f.before for n, f in fits.items()}))
            lines.append((f"{run.name}, after its fit", {n: f.after for n, f in fits.items()}))
    lines = [(name, layers) for name, layers in lines if any(layers.values())]
    if not lines:
        return None
    order = list(dict.fromkeys(layer for _, layers in lines for layer in layers))
    said = [
        f"{name} {fmean(layers.values()):.3f} on average, "
        f"{max(layers.values()):.3f} at worst ({max(layers, key=layers.__getitem__)})"
        for name, layers in lines
    ]
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [order.index(layer) for layer in layers],
            "y": [rounded(value) for value in layers.values()],
            "text": list(layers),
            "hovertemplate": "%{text}<br>%{y}<extra>" + name + "</extra>",
            **series(number),
        }
        for number, (name, layers) in enumerate(lines)
    ]
    rows = [
        {"layer": layer, **{name: layers.get(layer) for name, layers in lines}} for layer in order
    ]
    shape = layer_layout(order, "relative squared error")
    shape["yaxis"]["rangemode"] = "tozero"
    return Figure(
        "layer-errors",
        "Output error of each MoE layer",
        "Squared error of a layer's output as a share of its squared norm: "
        + "; ".join(said)
        + ".",
        {"data": data, "layout": shape},
        table=Table.of("Output error by layer", rows),
    )
