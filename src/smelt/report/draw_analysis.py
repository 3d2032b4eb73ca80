"""Figures of `smelt analyse` as the page shows them: α and β, gradients, similarity, curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from smelt.report.blocks import Figure, Table, join, rounded, slug, with_error
from smelt.report.draw_plans import Spec, layout, series
from smelt.report.quality import short
from smelt.report.runs import Run

Found = Mapping[str, Any]


def heat(matrix: Sequence[Sequence[Any]], columns: str, rows: str, **more: Any) -> Spec:
    """A heat map of numbers around 0, or of those from 0 to 1; what its axes are, for a label."""
    values = [[rounded(v) for v in row] for row in matrix]
    known = [abs(v) for row in values for v in row if v is not None]
    largest = max(known, default=1.0) or 1.0
    is_signed = any(v is not None and v < 0 for row in values for v in row)
    return {
        "type": "heatmap",
        "z": values,
        "zmin": -largest if is_signed else 0,
        "zmax": largest,
        "colorscale": "@div" if is_signed else "@seq",
        "xgap": 1,
        "ygap": 1,
        "texttemplate": "%{z:.2f}" if len(values) <= 8 and len(values[0]) <= 8 else "",
        "hovertemplate": f"{rows} %{{y}}, {columns} %{{x}}: %{{z}}<extra></extra>",
        "colorbar": {"thickness": 12, "outlinewidth": 0},
        **more,
    }


def heat_layout(x: str, y: str) -> Spec:
    """Rows from the top, whole numbers on both axes."""
    shape = layout(x, y)
    shape["xaxis"] |= {"dtick": 1, "showgrid": False, "constrain": "domain"}
    shape["yaxis"] |= {"dtick": 1, "autorange": "reversed", "showgrid": False}
    return shape


def alpha(run: Found) -> list[Figure]:
    """A heat map of α for every column: one, or one per expert or matrix."""
    found = (run.get("mixing") or {}).get("alpha")
    if not found:
        return []
    figures = []
    for column, name in enumerate(found["columns"]):
        matrix = [[entry[column] for entry in layer] for layer in found["values"]]
        rank = found["effective_rank"][column]
        distances = [
            row[column] for row in found["distance_from_one_hot"] if row[column] is not None
        ]
        words = f"Effective rank {rank:.2f} of at most {found['highest_rank']}"
        if distances:
            mean = sum(distances) / len(distances)
            words += (
                f"; the rows are {mean:.2f} from one-hot on average (0: one entry each; "
                f"{found['farthest_from_one_hot']:.2f}: an even blend)"
            )
        columns = ("layer", *(f"entry {p}" for p in range(len(matrix[0]))))
        figures.append(
            Figure(
                f"alpha-{slug(run['run'])}-{column}",
                f"α of {run['run']}" + ("" if name == "all" else f", {name}"),
                words + ".",
                {
                    "data": [heat(matrix, "entry", "layer")],
                    "layout": heat_layout("pool entry", "MoE layer"),
                },
                height=140 + 34 * max(4, min(16, len(matrix))),
                is_half=True,
                table=Table(
                    f"α of {run['run']}", columns, tuple((i, *row) for i, row in enumerate(matrix))
                ),
            )
        )
        if len(figures) == 4:
            break
    return figures


def beta(runs: Sequence[Found]) -> Figure | None:
    """β by layer, a line per run."""
    known = [(run["run"], run["mixing"]["beta"]["values"]) for run in runs if _has(run, "beta")]
    if not known:
        return None
    ends = [f"{name} from {min(values):.2f} to {max(values):.2f}" for name, values in known]
    rows = [
        {"layer": i, **{name: values[i] for name, values in known if i < len(values)}}
        for i in range(max(len(values) for _, values in known))
    ]
    return Figure(
        "beta",
        "β by layer",
        f"The factor of what reaches each MoE layer from below: {join(ends)}.",
        {
            "data": [
                _line(name, list(range(len(values))), values, number)
                for number, (name, values) in enumerate(known)
            ],
            "layout": _whole(layout("MoE layer", "β")),
        },
        table=Table.of("β by layer", rows),
        is_half=True,
    )


def _whole(shape: Spec) -> Spec:
    """With whole numbers on the horizontal axis."""
    shape["xaxis"] |= {"tickformat": "d", "tickmode": "auto", "nticks": 12, "zeroline": False}
    return shape


def _has(run: Found, name: str) -> bool:
    return bool((run.get("mixing") or {}).get(name))


def _line(name: str, x: Sequence[Any], y: Sequence[Any], number: int) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": [rounded(value) for value in y],
        "hovertemplate": "%{x}: %{y}<extra>" + name + "</extra>",
        **series(number),
    }


def gradients(variants: Sequence[Found]) -> list[Figure]:
    """Signal-to-noise and size of the experts' gradients by layer."""
    figures = []
    for quantity, title, words in (
        ("snr", "Signal-to-noise of the experts' gradients", "signal-to-noise ratio"),
        ("norm", "Size of the experts' gradients", "norm"),
    ):
        data, rows, said = [], [], []
        for number, variant in enumerate(v for v in variants if v.get("gradients")):
            layers = [
                one for one in variant["gradients"]["experts_by_layer"] if one[quantity] is not None
            ]
            if not layers:
                continue
            blocks = [one["block"] for one in layers]
            means = [one[quantity]["mean"] for one in layers]
            data.append(_line(variant["variant"], blocks, means, number))
            mean = sum(means) / len(means)
            said.append(f"{variant['variant']} {mean:.3g} on average")
            rows += [
                {
                    "variant": variant["variant"],
                    "block": block,
                    words: with_error(one[quantity]["mean"], one[quantity]["sd"]),
                    "runs": one[quantity]["n"],
                }
                for block, one in zip(blocks, layers, strict=True)
            ]
        if data:
            figures.append(
                Figure(
                    f"gradients-{quantity}",
                    title,
                    f"What each MoE layer sends to its experts, {words}: {'; '.join(said)}.",
                    {"data": data, "layout": _whole(layout("block", words))},
                    table=Table.of(f"{title}: mean ± standard deviation over runs", rows),
                    is_half=True,
                )
            )
    return figures


def contributions(run: Found) -> Figure | None:
    """Cosines between what the layers send to the experts they share."""
    shared = (run.get("gradients") or {}).get("contributions") or []
    if not shared:
        return None
    first = shared[0]
    matrix, layers = first["cosine"], first["layers"]
    words = (
        f"Alignment {first['alignment']:.2f}: 1 where the layers' gradients are orthogonal, "
        f"{len(layers)} where they are equal, below 1 where they undo each other's work."
    )
    columns = ("layer", *(f"layer {i}" for i in layers))
    rows = tuple((i, *row) for i, row in zip(layers, matrix, strict=True))
    return Figure(
        f"contributions-{slug(run['run'])}",
        f"Do the layers of {run['run']} pull their shared experts one way?",
        words,
        {
            "data": [heat(matrix, "layer", "layer", x=list(layers), y=list(layers))],
            "layout": heat_layout("MoE layer", "MoE layer"),
        },
        height=420,
        table=Table("Cosines between the layers' mean gradients of the pool", columns, rows),
        is_half=True,
    )


def alike(variant: Found, name: str, title: str, words: str) -> Figure | None:
    """A matrix of how alike layers are."""
    found = (variant.get("similarity") or {}).get(name)
    if not found:
        return None
    matrix = found["mean"]
    off = [v for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j and v is not None]
    mean = f"{sum(off) / len(off):.2f} on average between different ones" if off else ""
    columns = ("", *map(str, range(len(matrix))))
    return Figure(
        f"{slug(name)}-{slug(variant['variant'])}",
        f"{title}, {variant['variant']}",
        f"{words}: {mean}.",
        {"data": [heat(matrix, "", "")], "layout": heat_layout("", "")},
        height=420,
        table=Table(title, columns, tuple((i, *row) for i, row in enumerate(matrix))),
        is_half=True,
    )


def curves(runs: Sequence[Run]) -> Figure | None:
    """Training and held-out loss against the step, from the logs of trained runs."""
    data: list[Spec] = []
    rows: list[Spec] = []
    for run in runs:
        for name, points in _curves(run).items():
            if len(points) < 2:
                continue
            label = f"{run.name}, {name}"
            line = _line(label, list(points), list(points.values()), len(data))
            data.append(line | {"mode": "lines"})
            rows.append(
                {
                    "run": run.name,
                    "loss": name,
                    "first": next(iter(points.values())),
                    "last": list(points.values())[-1],
                    "least": min(points.values()),
                    "steps": max(points),
                }
            )
    if not data:
        return None
    last = join([f"{row['run']}, {row['loss']}: {row['last']:.3f}" for row in rows])
    return Figure(
        "loss",
        "Loss in training",
        f"Nats per token at the end: {last}.",
        {"data": data, "layout": layout("step", "nats per token")},
        table=Table.of("Loss in training", rows),
    )


def _curves(run: Run) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in run.log:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if isinstance(line.get("nats"), float):
            found.setdefault("training", {})[step] = line["nats"]
        held = line.get("held_out")
        for source, value in held.items() if isinstance(held, dict) else ():
            if isinstance(value, float):
                found.setdefault(short(source), {})[step] = value
    return found
