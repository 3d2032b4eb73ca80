"""Figures against cost: quality with its front, decode times, the roofline."""

from collections.abc import Mapping, Sequence
from typing import Any

from smelt.report.bench import Bench
from smelt.report.blocks import Figure, Table, count, join, rounded, size, with_error
from smelt.report.costs import COSTS, Costs, Point, beaten_by, front, points, timed_steps
from smelt.report.draw_plans import SYMBOLS, Spec, layout, series
from smelt.report.names import Subject
from smelt.report.quality import Quality

Subjects = Mapping[str, Subject]


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
    best = front(found, is_lower_better=quality.is_lower_better)
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


def decode(benches: Sequence[Bench], subjects: Subjects) -> Figure | None:
    """Milliseconds per step against batch, a line per checkpoint and context."""
    steps = timed_steps(benches)
    if not steps:
        return None
    lines: dict[tuple[str, int], dict[int, float]] = {}
    for step in steps:
        assert step.time is not None
        lines.setdefault((step.fingerprint, step.context), {})[step.batch] = step.time
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
    fastest = min(steps, key=lambda s: (s.batch, s.time or 0.0))
    words = (
        f"At batch {fastest.batch} {subjects[fastest.fingerprint].label} is the fastest with "
        f"{fastest.time:.3g} ms per step (median of the turns)."
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
        memory, peaks = bench.memory_rate, bench.flop_rates()
        steps = [s for s in (*bench.decode, *bench.prefill) if s.time and s.flops and s.num_bytes]
        if memory and peaks and steps:
            break
    else:
        return None
    peak = max(peaks.values())
    names = list(dict.fromkeys(step.fingerprint for step in steps))
    rows, data = [], []
    for number, fingerprint in enumerate(names):
        own = [step for step in steps if step.fingerprint == fingerprint]
        label = subjects[fingerprint].label
        xs, ys, words = [], [], []
        for step in own:
            assert step.time and step.flops and step.num_bytes
            intensity, speed = step.flops / step.num_bytes, step.flops / step.time * 1e3
            rate = step.num_bytes / step.time * 1e3
            from_cache = step.reads_from == "cache" and bench.cache_rate is not None
            bandwidth = (bench.cache_rate if from_cache else memory) or memory
            roof = min(bandwidth * intensity, peak_of(peaks, step.num_rows))
            xs.append(rounded(intensity))
            ys.append(rounded(speed))
            words.append(step.name)
            rows.append(
                {
                    "checkpoint": label,
                    "timed": step.name,
                    "FLOP per byte": intensity,
                    "GFLOP/s": speed / 1e9,
                    "GB/s": rate / 1e9,
                    "reads from": step.reads_from,
                    "of that bandwidth": f"{rate / bandwidth:.0%}",
                    "of its roof": f"{speed / roof:.0%}",
                }
            )
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": xs,
                "y": ys,
                "text": words,
                "hovertemplate": "%{text}<br>%{x} FLOP/B, %{y}FLOP/s<extra>" + label + "</extra>",
                "marker": series(number)["marker"] | {"size": 10},
            }
        )
    seen = [x for one in data for x in one["x"]]
    slopes = {"memory": memory} | ({"cache": bench.cache_rate} if bench.cache_rate else {})
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


def peak_of(peaks: Mapping[int, float], num_rows: int) -> float:
    """FLOPs per second of products of so many rows: as of the most that were tried and are no more.

    Of fewer rows than any that were tried: as of the fewest.
    """
    tried = [rows for rows in peaks if rows <= num_rows]
    return peaks[max(tried) if tried else min(peaks)]


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
                at = "" if speed.length is None else f", length {speed.length}"
                row[f"prefill tokens/s{at}"] = speed.tokens_per_second
            rows.append(row)
    return Table.of("What each checkpoint costs", rows) if rows else None
