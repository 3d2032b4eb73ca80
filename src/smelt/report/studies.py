"""Tables of studies and comparisons as the page shows them, read from their `tables.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

from smelt.report.blocks import Block, Figure, Section, Table, rounded, slug, with_error
from smelt.report.draw_plans import layout, series
from smelt.report.material import Named

_LEFT_OUT = {"nats_by_seed", "sha256", "residuals"}


def study(found: Named) -> Section:
    """The tables of one study, and its losses as a figure."""
    value = found.value
    blocks: list[Block] = []
    rows = [row for row in value.get("rows") or () if isinstance(row, Mapping)]
    drawn = _losses(found.name, rows)
    if drawn is not None:
        blocks.append(drawn)
    if rows:
        blocks.append(Table.of(f"Rows of {found.name}: mean ± deviation over seeds", _flat(rows)))
    if value.get("differences"):
        blocks.append(Table.of("Differences, paired by seed", _flat(value["differences"])))
    for table in value.get("tables") or ():
        title = " · ".join(str(table[key]) for key in ("part", "ground", "focus") if key in table)
        held = table.get("rows") or []
        held = list(held.values()) if isinstance(held, Mapping) else held
        kept = [row for row in held if isinstance(row, Mapping)]
        if kept:
            blocks.append(Table.of(title or found.name, _flat(kept), str(table.get("items") or "")))
    return Section(f"study-{slug(found.name)}", found.name, tuple(blocks))


def _flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with values that a cell can show: summaries as mean ± sd, groups by dotted names."""
    flat = []
    for row in rows:
        cells: dict[str, Any] = {}
        for name, value in row.items():
            if name in _LEFT_OUT:
                continue
            cells |= dict(_cells(name, value))
        flat.append(cells)
    return flat


def _cells(name: str, value: Any) -> list[tuple[str, Any]]:
    words = name.replace("_", " ")
    if isinstance(value, Mapping):
        if "mean" in value:
            mean = value["mean"]
            return [(words, None if mean is None else with_error(mean, value.get("sd")))]
        pairs = [(f"{words}, {key}", v) for key, v in value.items()]
        plain = [(key, v) for key, v in pairs if v is None or isinstance(v, int | float | str)]
        return plain[:6]
    if isinstance(value, list):
        return [(words, len(value))] if value and not isinstance(value[0], Mapping) else []
    return [(words, value)]


def _losses(name: str, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    known = [(row["row"], row["nats"]) for row in rows if row.get("row") and row.get("nats")]
    known = [(label, one) for label, one in known if one.get("mean") is not None][:60]
    if len(known) < 2:
        return None
    best = min(known, key=lambda pair: pair[1]["mean"])
    marker = series(0)["marker"]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [rounded(one["mean"]) for _, one in known],
            "y": [label for label, _ in known],
            "error_x": {
                "type": "data",
                "array": [rounded(one.get("sd")) or 0 for _, one in known],
                "color": "@c1",
            },
            "marker": marker,
            "hovertemplate": "%{y}: %{x} nats<extra></extra>",
        }
    ]
    shape = layout("held-out nats per token", "")
    shape["yaxis"] |= {"autorange": "reversed", "automargin": True}
    words = f"The lowest is {best[0]} with {with_error(best[1]['mean'], best[1].get('sd'))}"
    return Figure(
        f"study-{slug(name)}-losses",
        f"Losses of {name}",
        f"{words} (mean ± standard deviation over seeds).",
        {"data": data, "layout": shape},
        height=140 + 22 * len(known),
    )
