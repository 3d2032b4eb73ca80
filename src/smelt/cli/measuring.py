"""The commands that look and measure: `inspect` and `evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, counts, number, size
from smelt.errors import RecipeError

if TYPE_CHECKING:
    from smelt.checkpoint.describe import Description
    from smelt.compress.outlook import Outlook
    from smelt.evaluate.tasks import TaskScore


def inspect(
    source: options.Source,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the weights with their SHA-256 checksums.")
    ] = False,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what is in a checkpoint, and what a smaller one would save. Reads no weights.

    Example: smelt inspect Qwen3-30B-A3B
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    from smelt.api import open_checkpoint
    from smelt.checkpoint.describe import describe
    from smelt.checkpoint.verify import verify as verify_files
    from smelt.compress.facts import read_facts
    from smelt.compress.outlook import legal_counts, outlook
    from smelt.evaluate.results import markdown

    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    facts = read_facts(checkpoint)
    about = describe(checkpoint, facts.anatomy)
    verified = None
    if verify:
        with screen.watching() as stages:
            verified = verify_files(checkpoint.folder, stages("verify"))
    value: dict[str, Any] = about.to_dict() | {"verified_files": verified}
    text = _about(about, verified)
    if about.num_stored == about.num_experts:
        found = outlook(facts.layers, facts.other_bytes)
        legal = legal_counts(facts.layers[0])
        value |= {"legal_experts": legal, "outlook": [vars(one) for one in found]}
        text += _outlook(found, legal, about.num_experts[0], markdown)
    screen.result(value, text)


def _about(about: "Description", verified: int | None) -> str:
    stored = about.quantised or about.dtype
    files = f"{about.num_files} file" + "s" * (about.num_files > 1)
    lines = [
        about.folder,
        f"{about.architecture} ({about.family}), {stored}, {files}, {size(about.num_bytes)}",
        f"{number(about.num_params)} parameters, {number(about.num_active_params)} used per token",
        "",
        f"{about.num_blocks} blocks: {len(about.layers)} MoE layers"
        + (
            f" in {about.num_blocks - about.num_dense_blocks} of them"
            if about.num_dense_blocks
            else ""
        )
        + f", {counts(about.num_experts)} experts each, {about.top_k} per token, "
        f"{about.router} router",
    ]
    if about.num_stored != about.num_experts:
        lines.append(f"stored: {counts(about.num_stored)} experts per layer (mapped form)")
    lines += [f"- {fact}" for fact in about.facts]
    lines.append("")
    for part, num_bytes in about.bytes_by_part.items():
        if num_bytes:
            share = num_bytes / about.num_bytes
            lines.append(f"{part:>17}  {size(num_bytes):>8}  {share:6.1%}")
    if about.made is not None:
        made = about.made
        words = (
            f"Made by smelt from {made.source}: {counts(made.experts_before)} → "
            f"{counts(made.experts_after)} experts per layer ({made.method}, {made.form} form), "
            f"{size(made.bytes_before)} before"
        )
        lines += ["", words]
    if verified is not None:
        unknown = about.num_files - verified
        lines.append("")
        if verified:
            lines.append(f"{verified} of {about.num_files} files match their SHA-256 checksums.")
        if unknown:
            lines.append(f"No checksum is known for {unknown} of them: damage cannot be told.")
    return "\n".join(lines) + "\n"


def _outlook(found: "list[Outlook]", legal: list[int], num_experts: int, markdown: Any) -> str:
    rows = [
        {
            "keep": f"{one.keep:.0%}",
            "experts": one.experts,
            "bytes": size(one.bytes_after),
            "saved": f"{one.saved:.0%}",
            "note": None if one.is_exact else "nearest that the router can hold",
        }
        for one in found
    ]
    if len(legal) == num_experts - legal[0] + 1:
        allowed = f"{legal[0]} to {num_experts}"
    else:
        allowed = ", ".join(map(str, legal))
    return (
        f"\nA stock checkpoint of this family can have {allowed} experts per layer; the mapped "
        f"form any count.\n\n{markdown(rows)}"
    )


def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoint folders or hub ids.")],
    original: Annotated[
        str | None,
        typer.Option("--original", help="Hold the others against this one: KL, layers, routing."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Zero-shot tasks, e.g. blimp,lambada (files in SMELT_DATA)."),
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
    With --tasks alone, tasks are all that is measured.

    Example: smelt evaluate SRC small --original SRC --text notes.txt
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    recipe = options.text_recipe({"text": text, "num_tokens": tokens, "seed": seed}, settings)
    from smelt import api
    from smelt.evaluate import results

    if output is not None and output.exists():
        raise RecipeError(f"{output}: exists. smelt overwrites nothing: name another file.")
    with screen.watching() as stages:
        found = api.evaluate(
            checkpoints,
            original=original,
            tasks=[] if tasks is None else [name.strip() for name in tasks.split(",")],
            limit=limit,
            device=device or "cpu",
            bits_per_byte_only=bits_per_byte_only,
            trust_remote_code=trust_remote_code,
            stages=stages,
            **recipe.model_dump(exclude_unset=True),
        )
    if output is not None:
        results.save(found.results, output)
    rows = found.rows()
    value = {"checkpoints": rows, "results": [vars(one) for one in found.results]}
    tables = [
        results.markdown(_side_by_side(rows, results.cell)),
        results.markdown(_task_rows(found.tasks, results.cell)) + _task_notes(found.tasks),
        f"Saved to {output}" if output else "",
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
