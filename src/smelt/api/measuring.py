"""Measure checkpoints side by side, and look into trained models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from smelt.api.compressing import open_checkpoint
from smelt.checkpoint.device import check_device
from smelt.compress.pipeline import (
    Stages,
    silent,
)
from smelt.errors import RecipeError
from smelt.evaluate.evaluation import (
    Evaluation,
    measure_benchmarks,
    measure_tasks,
    measure_text,
)
from smelt.evaluate.task_model import check_model
from smelt.evaluate.tasks import read_items
from smelt.evaluate.text2text import check_text2text, read_benchmarks
from smelt.export.engine import check_writer
from smelt.recipe import CalibrationRecipe, check_recipe
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
    # A limit of nothing is refused there too.
    has_items = bool(tasks) or (limit is not None and not benchmarks)
    items = read_items(tasks, limit=limit) if has_items else []
    asked = read_benchmarks(benchmarks, part=part, limit=limit)
    gguf_paths = [Path(path) for path in paths if Path(path).suffix == ".gguf"]
    paths = [path for path in paths if Path(path).suffix != ".gguf"]
    opened = [open_checkpoint(path, trust_remote_code=trust_remote_code) for path in paths]
    if gguf_paths:
        if items or asked:
            raise RecipeError(
                f"{gguf_paths[0].name}: tasks are asked of checkpoints that transformers runs. "
                "Leave GGUF files out, or the tasks."
            )
        check_writer()
        from smelt.evaluate.gguf_loss import measure_files, open_files

        files = open_files(gguf_paths, opened[0] if opened else None)
    first = None
    if original is not None:
        first = open_checkpoint(original, trust_remote_code=trust_remote_code)
    for one in opened if items else ():
        check_model(one.model, one.tokenizer)
    for one in opened if asked else ():
        check_text2text(one.model)
    names = [one.folder.name for one in opened]
    if len(set(names)) < len(names):  # folders of one name: say which
        names = [str(path) for path in paths]
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
    if gguf_paths:
        more = measure_files(
            files,
            _file_names(gguf_paths),
            opened[0],
            recipe,
            first=found.compared[0].perplexity,
            stages=stages,
        )
        found = replace(
            found,
            compared=found.compared + more.compared,
            fidelity=found.fidelity + more.fidelity,
            results=found.results + more.results,
        )
    seed = recipe.seed
    if items:
        more = measure_tasks(opened, names, items, seed=seed, device=device, stages=stages)
        found = replace(found, tasks=more.tasks, results=found.results + more.results)
    if asked:
        more = measure_benchmarks(
            opened, names, asked, max_input=max_input, seed=seed, device=device, stages=stages
        )
        found = replace(found, benchmarks=more.benchmarks, results=found.results + more.results)
    return found


def _file_names(paths: Sequence[Path]) -> list[str]:
    """What to call files: by name, or by path where two have one name."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def analyse(
    runs: Sequence[str | Path], folder: str | Path, *, stages: Stages = silent, **settings: Any
) -> dict[str, Any]:
    """Gradients, α and β, similarity of layers and curves of trained models (docs/analysis.md).

    Figures and `analysis.json`, which is also the value returned, go to `folder`.

    Args:
        runs: folders of `train`; those of several seeds by their parent.
        settings: those of `AnalysisSettings`: text, micro_batches, batch_size, seed, …
    """
    from smelt.analyse.ground import AnalysisSettings
    from smelt.analyse.run import analyse as run

    recipe = check_recipe(settings, AnalysisSettings, origin="settings")
    return run([str(one) for one in runs], Path(folder), recipe, stages=stages).value
