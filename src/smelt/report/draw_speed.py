"""Figures of speed: decode steps against batch, the roofline, what each checkpoint costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from smelt.bench.file import Bench
from smelt.bench.records import Timed
from smelt.bench.roofline import Rates
from smelt.report.blocks import Figure, Table, count, rounded, size
from smelt.report.draw_plans import Spec, layout, series
from smelt.report.names import Subjects


def decode(benches: Sequence[Bench], subjects: Subjects) -> Figure | None:
    """Milliseconds per step against batch, a line per checkpoint and context."""
    steps = [step for bench in benches for step in bench.decode]
    if not steps:
        return None
    lines: dict[tuple[str, int], dict[int, float]] = {}
    for step in steps:
        lines.setdefault((step.fingerprint, step.context), {})[step.batch] = step.ms_median
    contexts = {context for _, context in lines}
    data, rows = [], []
    for number, ((fingerprint, context), times) in enumerate(lines.items()):
        label = subjects[fingerprint].label
        name = label if len(contexts) == 1 else f"{label}, context {context}"
        batches = sorted(times)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": batches,
                "y": [rounded(times[batch]) for batch in batches],
                "hovertemplate": "batch %{x}: %{y} ms<extra>" + name + "</extra>",
                **series(number),
            }
        )
        rows += [
            {"checkpoint": label, "context": context, "batch": b, "ms per step": times[b]}
            for b in batches
        ]
    shape = layout("batch", "ms per step")
    shape["xaxis"] |= {"type": "log", "tickvals": sorted({s.batch for s in steps})}
    shape["yaxis"] |= {"type": "log", "exponentformat": "none"}
    fastest = min(steps, key=lambda s: (s.batch, s.ms_median))
    words = (
        f"At batch {fastest.batch} {subjects[fastest.fingerprint].label} is the fastest with "
        f"{fastest.ms_median:.3g} ms per step (median of the turns)."
    )
    return Figure(
        "decode",
        "Decode time per step",
        words,
        {"data": data, "layout": shape},
        height=400,
        table=Table.of("Decode time per step", rows),
        is_half=True,
    )


def roofline(benches: Sequence[Bench], subjects: Subjects) -> Figure | None:
    """FLOPs per second against FLOPs per byte, beneath the measured roofs of this machine."""
    for bench in benches:
        rates, steps = bench.rates, [s for s in bench.cells if s.flops and s.num_bytes]
        if rates is not None and steps:
            break
    else:
        return None
    memory, peak = rates.memory, max(rates.flops.values())
    names = list(dict.fromkeys(step.fingerprint for step in steps))
    rows: list[dict[str, Any]] = []
    data: list[Spec] = []
    for number, fingerprint in enumerate(names):
        label = subjects[fingerprint].label
        own = [_beneath(s, rates, label) for s in steps if s.fingerprint == fingerprint]
        rows += own
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [rounded(row["FLOP per byte"]) for row in own],
                "y": [rounded(row["GFLOP/s"] * 1e9) for row in own],
                "text": [row["timed"] for row in own],
                "hovertemplate": "%{text}<br>%{x} FLOP/B, %{y}FLOP/s<extra>" + label + "</extra>",
                "marker": series(number)["marker"] | {"size": 10},
            }
        )
    seen = [x for one in data for x in one["x"]]
    slopes = {"memory": memory} | ({"cache": rates.cache} if rates.cache else {})
    data = _roofs(slopes, peak, seen) + data
    return Figure(
        "roofline",
        "Roofline",
        _roofline_words(rows, memory, peak),
        {"data": data, "layout": _log_layout("FLOP per byte read", "FLOP per second")},
        height=400,
        table=Table.of("What was timed beneath the roofs of this machine", rows),
        is_half=True,
    )


def _beneath(step: Timed, rates: Rates, label: str) -> dict[str, Any]:
    """What was timed, beneath the roof that its rows and its memory give it."""
    assert step.flops and step.num_bytes
    intensity, speed = step.flops / step.num_bytes, step.flops / step.ms_median * 1e3
    rate = step.num_bytes / step.ms_median * 1e3
    bandwidth = (rates.cache if step.reads_from == "cache" else None) or rates.memory
    roof = min(bandwidth * intensity, rates.flops_at(step.num_rows))
    return {
        "checkpoint": label,
        "timed": step.name,
        "FLOP per byte": intensity,
        "GFLOP/s": speed / 1e9,
        "GB/s": rate / 1e9,
        "reads from": step.reads_from,
        "of that bandwidth": f"{rate / bandwidth:.0%}",
        "of its roof": f"{speed / roof:.0%}",
    }


def _roofs(slopes: Mapping[str, float], peak: float, seen: Sequence[float]) -> list[Spec]:
    """A slanted roof for each place weights are read from, and the level one of products."""
    least, most = min(seen) / 3, max([*seen, *(peak / rate for rate in slopes.values())]) * 3
    roofs: list[Spec] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": f"weights out of the {place}, {rate / 1e9:.3g} GB/s",
            "x": [rounded(least), rounded(peak / rate)],
            "y": [rounded(rate * least), rounded(peak)],
            "line": {"color": "@ink", "width": 1.5, "dash": dash},
            "hoverinfo": "skip",
        }
        for (place, rate), dash in zip(slopes.items(), ("solid", "dot"), strict=False)
    ]
    level: Spec = {
        "type": "scatter",
        "mode": "lines",
        "name": f"products, {peak / 1e9:.3g} GFLOP/s",
        "x": [rounded(min(peak / rate for rate in slopes.values())), rounded(most)],
        "y": [rounded(peak), rounded(peak)],
        "line": {"color": "@ink", "width": 1.5, "dash": "dash"},
        "hoverinfo": "skip",
    }
    return [*roofs, level]


def _log_layout(x: str, y: str) -> Spec:
    shape = layout(x, y)
    shape["xaxis"] |= {"type": "log", "dtick": 1}
    shape["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "SI"}
    return shape


def _roofline_words(rows: Sequence[Mapping[str, Any]], memory: float, peak: float) -> str:
    nearest = max(rows, key=lambda row: float(str(row["of its roof"]).rstrip("%")))
    bound = sum(float(row["FLOP per byte"]) < peak / memory for row in rows)
    return (
        f"{bound} of {len(rows)} steps are bound by reading weights out of memory "
        f"({memory / 1e9:.3g} GB/s here); "
        f"{nearest['checkpoint']} ({nearest['timed']}) comes nearest to its roof, "
        f"{nearest['of its roof']}."
    )


def weights(benches: Sequence[Bench], subjects: Subjects) -> Table | None:
    """What each checkpoint weighs, and how fast it reads prompts."""
    rows = []
    for bench in benches:
        for one in bench.checkpoints:
            speeds = [p for p in bench.prefill if p.fingerprint == one.fingerprint]
            row: dict[str, Any] = {"checkpoint": subjects[one.fingerprint].label}
            for name, value, words in (
                ("on disk", one.folder_bytes, size),
                ("parameters", one.parameters, count),
                ("used per token", one.active_parameters, count),
                ("FLOPs per token", one.flops_per_token, count),
                ("peak memory", one.peak_memory_bytes, size),
            ):
                row[name] = None if value is None else words(value)
            row["seconds to load"] = one.load_seconds
            for speed in speeds:
                row[f"prefill tokens/s, length {speed.length}"] = speed.tokens_per_second
            rows.append(row)
    return Table.of("What each checkpoint costs", rows) if rows else None
