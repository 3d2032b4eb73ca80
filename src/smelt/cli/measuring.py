"""The command that measures quality: `evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen
from smelt.errors import RecipeError

if TYPE_CHECKING:
    from smelt.evaluate.tasks import TaskScore
    from smelt.evaluate.text2text import Benchmark


def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders or hub ids; GGUF files after their source."),
    ],
    original: Annotated[
        str | None,
        typer.Option("--original", help="Hold the others against this one: KL, layers, routing."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Zero-shot tasks, e.g. blimp,lambada (files in SMELT_DATA)."),
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            "--benchmarks",
            help="Text-to-text tasks that an encoder–decoder was fine-tuned on, e.g. sst2,squad: "
            "scored choices, generated answers (files in SMELT_DATA; docs/tasks.md).",
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            "--part",
            help="Of a benchmark: report (the number that is told) or choose (anything picked).",
        ),
    ] = "report",
    max_input: Annotated[
        int | None,
        typer.Option(
            "--max-input",
            min=16,
            help="Tokens of a benchmark's input: as many as it was fine-tuned with (its own if "
            "left out).",
        ),
    ] = None,
    outcomes: Annotated[
        Path | None,
        typer.Option("--outcomes", help="Save every answer to the benchmarks, as JSON."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="At most so many items of a task, evenly spaced.")
    ] = None,
    text: options.Texts = None,
    tokens: options.Tokens = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save every number, as JSON.")
    ] = None,
    bits_per_byte_only: Annotated[
        bool,
        typer.Option(
            "--bits-per-byte-only", help="Allow checkpoints whose tokenizers cut text differently."
        ),
    ] = False,
    seed: options.Seed = None,
    device: options.Device = None,
    settings: options.Sets = None,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure checkpoints side by side on any text: loss, perplexity, bits per byte, fidelity.

    The text is 32,768 tokens held out of the Python library, unless --text and --tokens say others.
    With --tasks or --benchmarks alone, they are all that is measured.

    Example: smelt evaluate SRC small --original SRC --text notes.txt

    Example: smelt evaluate switch-sst2 --benchmarks sst2 --outcomes sst2.json
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    recipe = options.text_recipe({"text": text, "num_tokens": tokens, "seed": seed}, settings)
    from smelt import api
    from smelt.evaluate import results
    from smelt.evaluate.text2text import save_outcomes

    for path in (output, outcomes):
        if path is not None and path.exists():
            raise RecipeError(f"{path}: exists. smelt overwrites nothing: name another file.")
    if part not in ("report", "choose"):
        raise RecipeError(f"--part {part}: say report or choose.")
    with screen.watching() as stages:
        found = api.evaluate(
            checkpoints,
            original=original,
            tasks=[] if tasks is None else [name.strip() for name in tasks.split(",")],
            benchmarks=[] if benchmarks is None else [n.strip() for n in benchmarks.split(",")],
            part=part,  # type: ignore[arg-type]
            limit=limit,
            max_input=max_input,
            device=device or "cpu",
            bits_per_byte_only=bits_per_byte_only,
            trust_remote_code=trust_remote_code,
            stages=stages,
            **recipe.model_dump(exclude_unset=True),
        )
    if output is not None:
        results.save(found.results, output)
    if outcomes is not None:
        save_outcomes(found.benchmarks, outcomes)
    rows = found.rows()
    value = {"checkpoints": rows, "results": [vars(one) for one in found.results]}
    tables = [
        results.markdown(_side_by_side(rows, results.cell)),
        results.markdown(_task_rows(found.tasks, results.cell)) + _task_notes(found.tasks),
        results.markdown(_benchmark_rows(found.benchmarks, results.cell))
        + _benchmark_notes(found.benchmarks),
        "".join(f"Saved to {path}\n" for path in (output, outcomes) if path),
    ]
    screen.result(value | {"seconds": screen.seconds}, "\n".join(filter(None, tables)))


_ERRORS = {
    "nats per token": "± se",
    "bits per byte": "± se, bits",
    "nats more than the first": "± se, paired",
}
"""The column with the standard error of a column."""


def _side_by_side(rows: list[dict[str, Any]], cell: Any) -> list[dict[str, Any]]:
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


def _task_rows(tasks: "dict[str, list[TaskScore]]", cell: Any) -> list[dict[str, Any]]:
    """A line per task and metric, and a column per checkpoint."""
    lines: list[dict[str, Any]] = []
    for scores in zip(*tasks.values(), strict=True):
        first = scores[0]
        line = {"task": first.task, "metric": first.metric, "items": first.n}
        line["chance"] = None if first.chance is None else cell(first.chance)
        for name, score in zip(tasks, scores, strict=True):
            error = score.standard_error
            line[name] = cell(score.value) + ("" if error is None else f" ± {error:.1g}")
        lines.append(line)
    return lines


def _task_notes(tasks: "dict[str, list[TaskScore]]") -> str:
    """Which of the tasks are subsets, and whose items were cut."""
    scores = [(name, score) for name, found in tasks.items() for score in found]
    notes = dict.fromkeys(score.source for _, score in scores if "subset" in score.source)
    for name, score in scores:
        if score.num_cut and score.source.startswith(f"{score.task}/"):
            notes[f"{name}, {score.task}: {score.num_cut:,} items cut on the left"] = None
    return "".join(f"- {note}\n" for note in notes)


def _benchmark_rows(found: "dict[str, list[Benchmark]]", cell: Any) -> list[dict[str, Any]]:
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


def _benchmark_notes(found: "dict[str, list[Benchmark]]") -> str:
    """Which items each benchmark has, and how many of them were cut."""
    notes = dict.fromkeys(
        f"- {one.source}" + (f": {one.share_cut:.1%} of the inputs cut" if one.share_cut else "")
        for benchmarks in found.values()
        for one in benchmarks
    )
    return "".join(f"{note}\n" for note in notes)
