"""Figures of quality against a cost, with the front of what nothing beats."""

from collections.abc import Sequence

from smelt.report.blocks import Figure, Table, count, join, rounded, size, with_error
from smelt.report.costs import COSTS, Costs, Point, beaten_by, best_by_cost, points
from smelt.report.draw_plans import SYMBOLS, Spec, layout, series
from smelt.report.names import Subjects
from smelt.report.quality import Quality


def cost_words(key: str, value: float) -> str:
    """A cost with its unit."""
    if key in ("bytes", "memory"):
        return size(value)
    return count(value) if key == "flops" else f"{value:.3g} ms"


def pareto(quality: Quality, key: str, costs: Costs, subjects: Subjects) -> Figure | None:
    """Quality against one cost; what nothing beats is joined by a line."""
    found = points(quality, costs.by_key[key])
    if len(found) < 2:
        return None
    best = best_by_cost(found, is_lower_better=quality.is_lower_better)
    title = COSTS[key][0]
    if key == "decode" and costs.decode_at is not None:
        title += f" (batch {costs.decode_at[0]}, context {costs.decode_at[1]})"
    name = f"pareto-{quality.name.replace(' ', '-')}-{key}"
    return Figure(
        name,
        f"{quality.name[:1].upper()}{quality.name[1:]} against {title}",
        _finding(found, best, quality, key, subjects),
        {"data": _pareto_data(found, best, key, subjects), "layout": _pareto_layout(quality, key)},
        is_half=True,
        table=_pareto_table(found, best, quality, key, costs, subjects),
    )


def _pareto_data(
    found: Sequence[Point], best: Sequence[Point], key: str, subjects: Subjects
) -> list[Spec]:
    line: Spec = {
        "type": "scatter",
        "mode": "lines",
        "name": "front: nothing is better at no more cost",
        "x": [rounded(one.cost) for one in best],
        "y": [rounded(one.value) for one in best],
        "line": {"color": "@muted", "dash": "dot", "shape": "hv", "width": 1.5},
        "hoverinfo": "skip",
    }
    marks = []
    numbers = {fingerprint: number for number, fingerprint in enumerate(subjects)}
    for one in found:
        number, is_best = numbers[one.fingerprint], one in best
        look = series(number)["marker"] | {"size": 12, "symbol": SYMBOLS[number % len(SYMBOLS)]}
        if not is_best:
            look["symbol"] += "-open"
        label = subjects[one.fingerprint].label
        marks.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label + ("" if is_best else " (beaten)"),
                "x": [rounded(one.cost)],
                "y": [rounded(one.value)],
                "error_y": _error(one.error, number),
                "marker": look | {"line": {"width": 2, "color": look["color"]}},
                "hovertemplate": f"{label}<br>{cost_words(key, one.cost)}<br>"
                f"{with_error(one.value, one.error)}<extra></extra>",
            }
        )
    return [line, *marks]


def _error(error: float | None, number: int) -> Spec:
    if error is None:
        return {"visible": False}
    colour = f"@c{number % 8 + 1}"
    return {"type": "data", "array": [rounded(error)], "color": colour, "thickness": 1.2}


def _pareto_layout(quality: Quality, key: str) -> Spec:
    arrow = "lower is better" if quality.is_lower_better else "higher is better"
    shape = layout(COSTS[key][0], f"{quality.name}, {arrow}")
    shape["xaxis"] |= {"rangemode": "tozero", "exponentformat": "SI"}
    if key in ("bytes", "memory"):
        shape["xaxis"]["ticksuffix"] = "B"
    if key == "decode":
        shape["xaxis"]["ticksuffix"] = " ms"
    return shape


def _finding(
    found: Sequence[Point], best: Sequence[Point], quality: Quality, key: str, subjects: Subjects
) -> str:
    """Who is on the front, and who is beaten by whom, by how much, and whether that is chance."""
    on = join([subjects[one.fingerprint].label for one in best])
    words = [f"On the front: {on}."]
    for one in found:
        other = beaten_by(one, found, is_lower_better=quality.is_lower_better)
        if other is None:
            continue
        mine, theirs = subjects[one.fingerprint].label, subjects[other.fingerprint].label
        error = one.error_of_difference(other)
        difference = abs(one.value - other.value)
        words.append(
            f"{mine} is beaten by {theirs}, which costs {cost_words(key, other.cost)} against "
            f"{cost_words(key, one.cost)} and is better by {with_error(difference, error)}"
            + (": within two standard errors." if _is_chance(difference, error) else ".")
        )
    known = any(one.error is not None for one in found)
    return " ".join(words) + (" Bars are one standard error." if known else "")


def _is_chance(difference: float, error: float | None) -> bool:
    return error is not None and difference < 2 * error


def _pareto_table(
    found: Sequence[Point],
    best: Sequence[Point],
    quality: Quality,
    key: str,
    costs: Costs,
    subjects: Subjects,
) -> Table:
    rows = [
        {
            "checkpoint": subjects[one.fingerprint].label,
            COSTS[key][0]: cost_words(key, one.cost)
            + (" (by the plan)" if key == "bytes" and one.fingerprint in costs.predicted else ""),
            quality.name: with_error(one.value, one.error),
            "on the front": "yes" if one in best else "no",
        }
        for one in found
    ]
    return Table.of(f"{quality.name} {quality.note} against {COSTS[key][0]}", rows)
