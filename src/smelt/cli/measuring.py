"""The command that measures quality: `evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from smelt.cli import measured, options
from smelt.cli.screen import Screen
from smelt.errors import RecipeError
from smelt.outputs import check_new


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
        typer.Option(
            "--tasks",
            help="Zero-shot tasks, e.g. blimp,lambada (files in SMELT_DATA), or those of "
            "lm-evaluation-harness by their names (docs/evaluation.md).",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=0, help="Solved examples before every question of a task."),
    ] = None,
    execute_code: Annotated[
        bool,
        typer.Option(
            "--execute-code", help="Allow humaneval: run what the model writes, in a sandbox."
        ),
    ] = False,
    task_folder: Annotated[
        Path | None,
        typer.Option("--task-folder", help="More tasks: lm-evaluation-harness's YAML files."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Each checkpoint less the first, item by item: paired bootstrap."
        ),
    ] = False,
    items: Annotated[
        Path | None,
        typer.Option("--items", help="Save what became of every item, for `smelt compare`."),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(
            "--last", min=1, help="Of each run of `smelt train`: the last so many checkpoints."
        ),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            "--generate",
            min=8,
            help="Let each write so many tokens after beginnings of the text: repetition, loops, "
            "KL to the original.",
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option("--prompts", min=2, help="Beginnings to go on from, with --generate.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="Of --generate; 0 is greedy.")
    ] = 0.0,
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
    With --tasks, --benchmarks or --generate alone, they are all that is measured.

    Example: smelt evaluate SRC small --original SRC --text notes.txt

    Example: smelt evaluate SRC small --tasks copa,piqa --compare -o scores.json --items items.json

    Example: smelt evaluate switch-sst2 --benchmarks sst2 --outcomes sst2.json
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    recipe = options.text_recipe({"text": text, "num_tokens": tokens, "seed": seed}, settings)
    from smelt import api
    from smelt.evaluate import results
    from smelt.evaluate.asking import Asking
    from smelt.evaluate.evaluation import Evaluation
    from smelt.evaluate.item_files import save_answers
    from smelt.evaluate.text2text import save_outcomes

    for path in (output, outcomes, items):
        if path is not None:
            check_new(path)
    if part not in ("report", "choose"):
        raise RecipeError(f"--part {part}: say report or choose.")
    if items is not None and tasks is None:
        raise RecipeError(
            "--items saves what became of the items of tasks: name some with --tasks."
        )
    runs = api.last_of(checkpoints, last) if last is not None else {}
    paths = [path for kept in runs.values() for path in kept] if runs else checkpoints
    given = recipe.model_dump(exclude_unset=True)
    is_asked = tasks is not None or benchmarks is not None or given.keys() & {"text", "num_tokens"}
    with screen.watching() as stages:
        written = []
        if generate is not None:
            how = {"tokens": generate, "prompts": prompts, "temperature": temperature}
            written = api.generate(
                paths,
                original=original,
                how=how,
                device=device or "cpu",
                trust_remote_code=trust_remote_code,
                stages=stages,
                **given,
            )
        found = Evaluation()
        if is_asked or generate is None:
            found = api.evaluate(
                paths,
                original=original,
                tasks=_listed(tasks),
                benchmarks=_listed(benchmarks),
                part=part,  # type: ignore[arg-type]
                limit=limit,
                asking=Asking(
                    shots=shots,
                    execute_code=execute_code,
                    task_folder=task_folder,
                    compare=compare,
                ),
                max_input=max_input,
                device=device or "cpu",
                bits_per_byte_only=bits_per_byte_only,
                trust_remote_code=trust_remote_code,
                stages=stages,
                **given,
            )
    every = found.results + [record for _, records in written for record in records]
    spreads = api.spreads_of(runs, every, trust_remote_code=trust_remote_code)
    if output is not None:
        results.save(every, output)
    if outcomes is not None:
        save_outcomes(found.benchmarks, outcomes)
    if items is not None:
        save_answers(found.answers, items)
    rows = found.rows()
    value = {
        "checkpoints": rows,
        "results": [vars(one) for one in every],
        "differences": [one.row() for one in found.paired],
        "spreads": [one.row() for one in spreads],
        "generations": [{"checkpoint": g.name, "texts": list(g.texts)} for g, _ in written],
    }
    tables = [
        results.markdown(measured.side_by_side(rows, results.cell)),
        results.markdown(measured.task_rows(found.tasks, results.cell))
        + measured.task_notes(found.tasks),
        results.markdown(measured.paired_rows(found.paired)),
        results.markdown(measured.benchmark_rows(found.benchmarks, results.cell))
        + measured.benchmark_notes(found.benchmarks),
        results.markdown(measured.generation_rows([g for g, _ in written], results.cell)),
        results.markdown(measured.spread_rows(spreads)),
        "".join(f"Saved to {path}\n" for path in (output, outcomes, items) if path),
    ]
    screen.result(value | {"seconds": screen.seconds}, "\n".join(filter(None, tables)))


def _listed(names: str | None) -> list[str]:
    return [] if names is None else [name.strip() for name in names.split(",")]
