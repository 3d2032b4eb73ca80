"""The quality of checkpoints side by side: text, tasks, benchmarks, what they write."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from smelt.api.compressing import open_checkpoint
from smelt.checkpoint.device import check_device
from smelt.checkpoint.source import Checkpoint
from smelt.compress.pipeline import Stages, silent
from smelt.errors import RecipeError
from smelt.evaluate.asking import Asking
from smelt.evaluate.evaluation import (
    Evaluation,
    measure_benchmarks,
    measure_tasks,
    measure_text,
)
from smelt.evaluate.generation import Generating, Generation, measure_generation
from smelt.evaluate.gguf_loss import measure_files, open_files
from smelt.evaluate.last import Spread, last_checkpoints, spreads
from smelt.evaluate.paired import compare_answers
from smelt.evaluate.results import Result
from smelt.evaluate.task_model import check_model
from smelt.evaluate.tasks import read_items
from smelt.evaluate.text2text import check_text2text, read_benchmarks
from smelt.export.engine import check_writer
from smelt.recipe import CalibrationRecipe
from smelt.settings import check_recipe
from smelt.text2text.files import Part


def evaluate(
    checkpoints: str | Path | Sequence[str | Path],
    *,
    original: str | Path | None = None,
    tasks: Sequence[str] = (),
    benchmarks: Sequence[str] = (),
    part: Part = "report",
    max_input: int | None = None,
    limit: int | None = None,
    asking: Asking | None = None,
    device: str = "cpu",
    bits_per_byte_only: bool = False,
    trust_remote_code: bool = False,
    stages: Stages = silent,
    **settings: Any,
) -> Evaluation:
    """Perplexity of checkpoints side by side, how near they stay to an original, and tasks.

        from smelt import api

        found = api.evaluate([source, "half"], original=source, num_tokens=2048)
        for row in found.rows():
            print(row["checkpoint"], row["nats per token"], row.get("KL"))

    Args:
        checkpoints: folders or hub ids; GGUF files too, after the checkpoint they were made from
            (docs/export.md).
        original: hold every other checkpoint against this one: logit KL, each layer's output
            error, routing agreement.
        tasks: zero-shot tasks by name (docs/evaluation.md), each model whole in memory. Where
            neither a text nor an original is named, they are all that is measured.
        asking: how tasks are asked: solved examples, comparison item by item
            (`Evaluation.paired`), …
        benchmarks: text-to-text tasks of encoder–decoders by name (docs/tasks.md), likewise.
        part: which part of a benchmark: to report, or to choose anything by.
        max_input: tokens of a benchmark's input; None: each one's own.
        limit: at most so many items of each task and benchmark, evenly spaced.
        bits_per_byte_only: allow checkpoints of different tokenizers.
        settings: the text, as in `calibrate`; the default is held out of smelt's own training.
    """
    paths = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    recipe = check_recipe(
        {"text": ["python:held-out"], "num_tokens": 32_768} | settings, CalibrationRecipe
    )
    check_device(device)
    asking = asking or Asking()
    if asking.compare and not (tasks and len(paths) > 1):
        raise RecipeError(
            "To compare takes tasks and two checkpoints or more: the others are held against the "
            "first, item by item."
        )
    # A limit of nothing is refused there too.
    has_items = bool(tasks) or (limit is not None and not benchmarks)
    items = (
        read_items(
            tasks,
            limit=limit,
            shots=asking.shots,
            execute_code=asking.execute_code,
            task_folder=asking.task_folder,
        )
        if has_items
        else []
    )
    asked = read_benchmarks(benchmarks, part=part, limit=limit)
    files = [Path(path) for path in paths if Path(path).suffix == ".gguf"]
    paths = [path for path in paths if Path(path).suffix != ".gguf"]
    opened = [open_checkpoint(path, trust_remote_code=trust_remote_code) for path in paths]
    engines = _opened_files(files, opened, has_tasks=bool(items or asked))
    first = None
    if original is not None:
        first = open_checkpoint(original, trust_remote_code=trust_remote_code)
    for one in opened if items else ():
        check_model(one.model, one.tokenizer)
    for one in opened if asked else ():
        check_text2text(one.model)
    names = _told_apart([one.folder.name for one in opened], paths)
    found = Evaluation()
    if not (items or asked) or first is not None or settings.keys() & {"text", "num_tokens"}:
        found = measure_text(
            opened,
            names,
            recipe,
            original=first,
            bits_per_byte_only=bits_per_byte_only,
            device=device,
            stages=stages,
        )
    if engines:
        found = found.joined(
            measure_files(
                engines,
                _told_apart([file.name for file in files], files),
                opened[0],
                recipe,
                first=found.compared[0].perplexity,
                stages=stages,
            )
        )
    seed = recipe.seed
    if items:
        more = measure_tasks(opened, names, items, seed=seed, device=device, stages=stages)
        paired = compare_answers(more.answers, seed=seed) if asking.compare else []
        found = found.joined(replace(more, paired=paired))
    if asked:
        found = found.joined(
            measure_benchmarks(
                opened, names, asked, max_input=max_input, seed=seed, device=device, stages=stages
            )
        )
    return found


def generate(
    checkpoints: Sequence[str | Path],
    *,
    original: str | Path | None = None,
    how: Mapping[str, Any] | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    stages: Stages = silent,
    **settings: Any,
) -> list[tuple[Generation, list[Result]]]:
    """What checkpoints write after beginnings of a text, and the records of it.

    Args:
        original: hold each against this one along what it wrote itself.
        how: settings of `smelt.evaluate.generation.Generating`: tokens, prompts, temperature, …
        settings: the text, as in `evaluate`.
    """
    recipe = check_recipe({"text": ["python:held-out"]} | settings, CalibrationRecipe)
    checked = check_recipe(dict(how or {}), Generating, origin="--generate")
    check_device(device)
    opened = [open_checkpoint(path, trust_remote_code=trust_remote_code) for path in checkpoints]
    first = None
    if original is not None:
        first = open_checkpoint(original, trust_remote_code=trust_remote_code)
    found = measure_generation(
        opened,
        _told_apart([one.folder.name for one in opened], checkpoints),
        recipe,
        checked,
        original=first,
        device=device,
        stages=stages,
    )
    return [(one, one.records(of)) for one, of in zip(found, opened, strict=True)]


def last_of(runs: Sequence[str | Path], num: int) -> dict[str, list[Path]]:
    """The last checkpoints that each run of `train` kept, to be measured instead of the run."""
    return {str(run): last_checkpoints(run, num) for run in runs}


def spreads_of(
    runs: Mapping[str, Sequence[Path]],
    results: Sequence[Result],
    *,
    trust_remote_code: bool = False,
) -> list[Spread]:
    """How every metric varies over the checkpoints of each run (`last_of`)."""
    prints = {
        run: [open_checkpoint(p, trust_remote_code=trust_remote_code).fingerprint for p in kept]
        for run, kept in runs.items()
    }
    return spreads(results, prints)


def _told_apart(names: list[str], paths: Sequence[str | Path]) -> list[str]:
    """What to call checkpoints: by their names, or by their paths where two have one name."""
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _opened_files(files: Sequence[Path], opened: Sequence[Checkpoint], *, has_tasks: bool) -> Any:
    """GGUF files as llama.cpp reads them, beside the checkpoint they were made from."""
    if not files:
        return []
    if has_tasks:
        raise RecipeError(
            f"{files[0].name}: tasks are asked of checkpoints that transformers runs. "
            "Leave GGUF files out, or the tasks."
        )
    check_writer()
    return open_files(files, opened[0] if opened else None)
