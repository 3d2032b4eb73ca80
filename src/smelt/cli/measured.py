"""The tables that `evaluate` and `compare` print."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smelt.evaluate.generation import Generation
    from smelt.evaluate.last import Spread
    from smelt.evaluate.outcomes import TaskScore
    from smelt.evaluate.paired import Paired
    from smelt.evaluate.results import Result
    from smelt.evaluate.text2text import Benchmark

_ERRORS = {
    "nats per token": "± se",
    "bits per byte": "± se, bits",
    "nats more than the first": "± se, paired",
}
"""The column with the standard error of a column."""


def side_by_side(rows: list[dict[str, Any]], cell: Any) -> list[dict[str, Any]]:
    """A column per checkpoint and a line per figure, with its standard error behind it."""
    figures = dict.fromkeys(name for row in rows for name in row)
    lines = []
    for figure in figures:
        if figure == "checkpoint" or figure in _ERRORS.values():
            continue
        line: dict[str, Any] = {"": figure}
        for row in rows:
            error = row.get(_ERRORS.get(figure, ""))
            value = cell(row.get(figure))
            line[row["checkpoint"]] = value if error is None else f"{value} ± {error:.1g}"
        if any(line[row["checkpoint"]] for row in rows):
            lines.append(line)
    return lines


def task_rows(tasks: "dict[str, list[TaskScore]]", cell: Any) -> list[dict[str, Any]]:
    """A line per task and metric, and a column per checkpoint."""
    lines: list[dict[str, Any]] = []
    for scores in zip(*tasks.values(), strict=True):
        first = scores[0]
        line = {"task": first.task, "metric": first.metric, "n": first.n, "of": first.unit}
        line["chance"] = None if first.chance is None else cell(first.chance)
        for name, score in zip(tasks, scores, strict=True):
            error = score.standard_error
            line[name] = cell(score.value) + ("" if error is None else f" ± {error:.1g}")
        lines.append(line)
    return lines


def task_notes(tasks: "dict[str, list[TaskScore]]") -> str:
    """Which of the tasks are subsets, and whose items were cut."""
    scores = [(name, score) for name, found in tasks.items() for score in found]
    notes = dict.fromkeys(score.source for _, score in scores if "subset" in score.source)
    for name, score in scores:
        if score.num_cut and score.source.startswith(f"{score.task}/"):
            notes[f"{name}, {score.task}: {score.num_cut:,} items cut on the left"] = None
    return "".join(f"- {note}\n" for note in notes)


def benchmark_rows(found: "dict[str, list[Benchmark]]", cell: Any) -> list[dict[str, Any]]:
    """A line per benchmark and metric: a column per checkpoint, and the best rule without one."""
    lines: list[dict[str, Any]] = []
    for benchmarks in zip(*found.values(), strict=True):
        for scores in zip(*(one.scores for one in benchmarks), strict=True):
            first = scores[0]
            line: dict[str, Any] = {"benchmark": benchmarks[0].task, "metric": first.metric}
            for name, score in zip(found, scores, strict=True):
                error = score.standard_error
                line[name] = cell(score.value) + ("" if error is None else f" ± {error:.1g}")
            rules = sorted(first.trivial, key=first.trivial.__getitem__)
            line["without a model"] = cell(first.trivial[rules[-1]]) if rules else None
            line["by"] = rules[-1] if rules else None
            line |= {"n": first.n, "of": first.unit}
            lines.append(line)
    return lines


def benchmark_notes(found: "dict[str, list[Benchmark]]") -> str:
    """Which items each benchmark has, and how many of them were cut."""
    notes = dict.fromkeys(
        f"- {one.source}" + (f": {one.share_cut:.1%} of the inputs cut" if one.share_cut else "")
        for benchmarks in found.values()
        for one in benchmarks
    )
    return "".join(f"{note}\n" for note in notes)


def generation_rows(found: "Sequence[Generation]", cell: Any) -> list[dict[str, Any]]:
    """A line per figure of what was written, a column per checkpoint, and the text's own."""
    lines: dict[str, dict[str, Any]] = {}
    for one in found:
        for figure in one.figures:
            line = lines.setdefault(figure.metric, {"generation": figure.metric})
            error = figure.standard_error
            line[one.name] = cell(figure.value) + ("" if error is None else f" ± {error:.1g}")
            line["the text itself"] = cell(one.of_text.get(figure.metric))
    last = "the text itself"
    return [
        {k: v for k, v in one.items() if k != last} | {last: one[last]} for one in lines.values()
    ]


def paired_rows(found: "Sequence[Paired]") -> list[dict[str, Any]]:
    """A line per metric and checkpoint: its difference to the first."""
    return [one.row() for one in found]


def spread_rows(found: "Sequence[Spread]") -> list[dict[str, Any]]:
    """A line per run and metric: its last checkpoints."""
    return [one.row() for one in found]


def result_rows(found: "Sequence[tuple[str, Result]]", cell: Any) -> list[dict[str, Any]]:
    """A line per task and metric and a column per measured checkpoint, from saved results."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for name, one in found:
        key = (one.task, one.metric)
        chance = None if one.chance is None else cell(one.chance)
        line = lines.setdefault(
            key, {"task": one.task, "metric": one.metric, "n": one.n, "chance": chance}
        )
        error = one.standard_error
        line[name] = cell(one.value) + ("" if error is None else f" ± {error:.1g}")
    return list(lines.values())
