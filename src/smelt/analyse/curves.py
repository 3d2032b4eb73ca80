"""Curves of training out of logs: mean ± standard deviation over the seeds of a variant."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from smelt.analyse.runs import Run

Line = Mapping[str, Any]

PHASES = frozenset(
    "router dispatch experts mixing attention dense head other optimizer data".split()
)


def _plain(name: str) -> Callable[[Line], float | None]:
    return lambda line: _number(line.get(name))


def _mean_of_layers(name: str) -> Callable[[Line], float | None]:
    def read(line: Line) -> float | None:
        values = line.get(name)
        if not isinstance(values, Sequence) or not values:
            return None
        return _number(fmean(values)) if all(map(_is_number, values)) else None

    return read


QUANTITIES: dict[str, tuple[Callable[[Line], float | None], str]] = {
    "nats": (_plain("nats"), "training loss, nats per token"),
    "balance": (_plain("balance"), "load balance, summed over layers"),
    "routing_entropy": (_mean_of_layers("routing_entropy"), "routing entropy, share of log E"),
    "dropped": (_mean_of_layers("dropped"), "choices dropped, share"),
    "gradient_norm": (_plain("gradient_norm"), "gradient norm before clipping"),
    "tokens_per_second": (_plain("tokens_per_second"), "tokens per second"),
}
"""What is drawn against the step, by the name of the curve: how a line says it, and its axis."""


def curves(runs: Sequence[Run]) -> dict[str, Any]:
    """The curves of the runs of one variant, for JSON; {} where no run has a log.

    A curve has the steps that at least one run logged, `n` runs of which logged each; `sd` is that
    of a sample (n − 1), and null where n is 1.
    """
    found: dict[str, Any] = {}
    for name, (read, _) in QUANTITIES.items():
        if name != "balance" or runs[0].kind != "dense":  # which is logged as 0
            found[name] = _curve([_points(run.log, read) for run in runs])
    sources = dict.fromkeys(
        source
        for run in runs
        for line in run.log
        for source in (line.get("held_out") or {} if isinstance(line.get("held_out"), dict) else {})
    )
    found["held_out"] = {
        source: _curve([_points(run.log, _of_source(source)) for run in runs]) for source in sources
    }
    found["phases"] = phases(runs)
    return {name: value for name, value in found.items() if value}


def _of_source(source: str) -> Callable[[Line], float | None]:
    return lambda line: _number((line.get("held_out") or {}).get(source))


def _points(log: Sequence[Line], read: Callable[[Line], float | None]) -> dict[int, float]:
    # A step may have several lines, of training and of what is held out.
    return {int(line["step"]): value for line in log if (value := read(line)) is not None}


def _curve(series: Sequence[Mapping[int, float]]) -> dict[str, Any] | None:
    steps = sorted({step for one in series for step in one})
    if not steps:
        return None
    columns = [[one[step] for one in series if step in one] for step in steps]
    return {
        "step": steps,
        "mean": [fmean(column) for column in columns],
        "sd": [stdev(column) if len(column) > 1 else None for column in columns],
        "n": [len(column) for column in columns],
    }


def tokens_per_step(run: Run) -> int | None:
    """Tokens that one step trains on; None: neither log nor recipe says."""
    for line in run.log:
        if _is_number(line.get("tokens")) and line["step"]:
            return round(float(line["tokens"]) / int(line["step"]))
    size, text = run.recipe.get("batch_size"), run.recipe.get("text") or {}
    return int(size * text["sequence_length"]) if size and "sequence_length" in text else None


def phases(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Milliseconds of a step by phase: the mean over a run's lines, then mean and sd over runs."""
    by_run = [found for run in runs if (found := _phases_of(run.log))]
    names = dict.fromkeys(name for one in by_run for name in one)
    if not names:
        return None
    columns = {name: [one[name] for one in by_run if name in one] for name in names}
    return {
        name: {"mean": fmean(c), "sd": stdev(c) if len(c) > 1 else None, "n": len(c)}
        for name, c in columns.items()
    }


def _phases_of(log: Sequence[Line]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for line in log:
        for key, value in line.items():
            if isinstance(value, dict) and len(PHASES & value.keys()) > 1:
                scale = 1e3 if "second" in key and "milli" not in key else 1.0
                for name, one in value.items():
                    found.setdefault(name, []).append(scale * one)
    return {name: fmean(values) for name, values in found.items()}


def _number(value: object) -> float | None:
    return float(value) if _is_number(value) else None  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
