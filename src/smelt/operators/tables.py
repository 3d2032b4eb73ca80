"""The tables of a study of operators: perplexity over the original's, mean ± sd over seeds."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from smelt.evaluate.results import markdown
from smelt.operators.runner import Progress, cell_name
from smelt.operators.settings import NO_FIT, OperatorsRecipe, asked
from smelt.study.store import read

TASKS = (
    "Tasks: seed means; of one seed the standard error and, in brackets, the 95 % interval of the "
    "difference to the original on the same items (paired bootstrap)."
)


def results(study: OperatorsRecipe, only: str | None = None) -> list[dict[str, Any]]:
    """One row for each cell that is done, with the model's own figures beside its own."""
    progress = Progress(study, only)
    rows = []
    for one in asked(study, only):
        found = read(progress.store.beside(one.group.id, "json")) or {}
        for variant, fit in one.cells:
            row = found.get("rows", {}).get(cell_name(variant, fit))
            if row is None or "nats" not in row:
                continue
            group = one.group
            named = {"model": group.model, "calibration": group.calibration, "seed": group.seed}
            rows.append(
                {**named, "keep": group.keep, "variant": variant, "fit": fit}
                | {"original": found["original"]}
                | row
            )
    return rows


def report(study: OperatorsRecipe, rows: Sequence[dict[str, Any]], num_left: int) -> str:
    """Every table as Markdown."""
    about = (
        "Perplexity ÷ the original's on the same held-out tokens, mean ± sd over the calibration "
        "seeds. Lost: the increase of log-perplexity as a share of what the best baseline without "
        f"a fit loses there ({', '.join(study.baselines) or 'none named'}). Seconds of planning, "
        "fitting and writing, and the process's peak memory meanwhile: means."
    )
    parts = [about]
    for model in study.models:
        for calibration in study.calibrations:
            here = [r for r in rows if (r["model"], r["calibration"]) == (model, calibration)]
            if here:
                parts += [
                    f"### {model}, calibrated on {calibration}",
                    markdown(_table(study, here)),
                ]
                if tasks := _tasks(here):
                    parts += [TASKS, markdown(tasks)]
    if num_left:
        parts.append(f"{num_left} cells are left.")
    return "\n\n".join(parts) + "\n"


def _table(study: OperatorsRecipe, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    table = []
    for variant, fit in _once((r["variant"], r["fit"]) for r in rows):
        mine = [r for r in rows if (r["variant"], r["fit"]) == (variant, fit)]
        row: dict[str, Any] = {"variant": variant, "fit": fit}
        for keep in _once(r["keep"] for r in rows):
            here = [r for r in mine if r["keep"] == keep]
            for text in study.held_out:
                row[f"{text} {keep:.0%}"] = spread([math.exp(more(r, text)) for r in here])
                best = _best_baseline(study, rows, keep, text)
                if here and best:
                    own = statistics.fmean(more(r, text) for r in here)
                    row[f"lost {text} {keep:.0%}"] = f"{own / best:.2f}"
        row["s"] = round(statistics.fmean(r["seconds"] for r in mine), 1)
        peaks = [r["peak_bytes"] for r in mine if r["peak_bytes"]]
        row["peak MB"] = round(statistics.fmean(peaks) / 1e6) if peaks else ""
        table.append(row)
    return table


def _best_baseline(
    study: OperatorsRecipe, rows: Sequence[dict[str, Any]], keep: float, text: str
) -> float | None:
    """The least mean increase of log-perplexity among the baselines without a fit."""
    means = [
        statistics.fmean(more(r, text) for r in here)
        for name in study.baselines
        if (
            here := [r for r in rows if (r["variant"], r["fit"], r["keep"]) == (name, NO_FIT, keep)]
        )
    ]
    return min(means, default=None)


def _tasks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each variant, fit and ratio that was asked tasks, the original first."""
    table = []
    asked_rows = [r for r in rows if r["tasks"]]
    if asked_rows:
        table.append(
            {"variant": "original", "fit": "", "keep": "", **_scores([asked_rows[0]["original"]])}
        )
    for variant, fit, keep in _once((r["variant"], r["fit"], r["keep"]) for r in asked_rows):
        here = [
            r for r in asked_rows if (r["variant"], r["fit"], r["keep"]) == (variant, fit, keep)
        ]
        table.append({"variant": variant, "fit": fit, "keep": f"{keep:.0%}", **_scores(here)})
    return table


def _scores(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By task and metric, the mean over rows, and error and paired interval of the first."""
    found: dict[str, str] = {}
    for task in _once(task for row in rows for task in row["tasks"]):
        first = next(row for row in rows if task in row["tasks"])
        for index, score in enumerate(first["tasks"][task]):
            values = [row["tasks"][task][index]["value"] for row in rows if task in row["tasks"]]
            error = score.get("standard_error")
            shown = f"{statistics.fmean(values):.3f}"
            shown += "" if error is None else f" ± {error:.3f}"
            if less := score.get("difference"):
                shown += f" [{less['low']:+.3f}, {less['high']:+.3f}]"
            found[f"{score['task']} {score['metric']}"] = shown
    return found


def more(row: dict[str, Any], text: str) -> float:
    """The increase of nats per token over the original's."""
    return float(row["nats"][text] - row["original"]["nats"][text])


def spread(values: Sequence[float]) -> str:
    """Mean ± sd; of one value, it alone; of none, nothing."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def _once(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
