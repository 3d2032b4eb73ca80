"""Figures of the stable rank of experts, a figure for each of their matrices."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from smelt.report.blocks import Figure, Table, rounded, slug
from smelt.report.draw_plans import Spec, layer_layout, series


def ranks(found: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Stable rank of the experts, one figure for each matrix: the mean over a layer's experts."""
    sides: dict[str, Mapping[str, Mapping[str, list[float]]]] = {}
    said = []
    for value in found:
        held, name = value["stable_rank"], value["folder"].rstrip("/").rpartition("/")[2]
        sides.setdefault(name, held["layers"])
        before = held.get("before")
        if before and before not in sides.values():
            sides[f"the original of {name}" if "the original" in sides else "the original"] = before
        if held.get("mean_ratio"):
            said.append(f"{name} has {held['mean_ratio']:.2f} times the original's (all matrices)")
    matrices = dict.fromkeys(m for side in sides.values() for one in side.values() for m in one)
    return [_rank_figure(matrix, sides, said) for matrix in matrices]


def _rank_figure(
    matrix: str, sides: Mapping[str, Mapping[str, Mapping[str, list[float]]]], said: Sequence[str]
) -> Figure:
    """‖W‖²_F / ‖W‖²₂ of one matrix, a line per checkpoint."""
    data: list[Spec] = []
    rows: list[Spec] = []
    ends = []
    for name, layers in sides.items():
        held = {layer: one[matrix] for layer, one in layers.items() if one.get(matrix)}
        if not held:
            continue
        means = {layer: fmean(values) for layer, values in held.items()}
        data.append(_rank_line(name, means, len(data)))
        ends.append(f"{name} {fmean(means.values()):.1f}")
        rows += [
            {
                "checkpoint": name,
                "layer": layer,
                "mean": fmean(values),
                "least": min(values),
                "most": max(values),
                "experts": len(values),
            }
            for layer, values in held.items()
        ]
    order = list(dict.fromkeys(row["layer"] for row in rows))
    words = f"How many directions the {matrix} matrices really use, on average: {', '.join(ends)}."
    return Figure(
        f"stable-rank-{slug(matrix)}",
        f"Stable rank of {matrix}",
        " ".join([words, *(f"{'; '.join(said)}." for _ in said[:1])]),
        {"data": data, "layout": layer_layout(order, "stable rank")},
        table=Table.of(f"Stable rank of {matrix} by layer", rows),
        is_half=True,
    )


def _rank_line(name: str, means: Mapping[str, float], number: int) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(range(len(means))),
        "y": [rounded(value) for value in means.values()],
        "text": list(means),
        "hovertemplate": "%{text}<br>%{y}<extra>" + name + "</extra>",
        **series(number),
    }
