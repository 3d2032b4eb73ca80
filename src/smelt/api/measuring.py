"""Measure checkpoints side by side, and look into trained models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from smelt.api.compressing import open_checkpoint
from smelt.bench.decode import DecodeSettings
from smelt.bench.file import Bench
from smelt.bench.run import WHAT, BenchSettings
from smelt.bench.run import measure as run_bench
from smelt.bench.subjects import parse_dtype
from smelt.checkpoint.device import check_device
from smelt.checkpoint.source import Checkpoint
from smelt.compress.pipeline import (
    Stages,
    silent,
)
from smelt.errors import RecipeError
from smelt.evaluate.asking import Asking
from smelt.evaluate.evaluation import (
    Evaluation,
    measure_benchmarks,
    measure_tasks,
    measure_text,
)
from smelt.evaluate.generation import Generating, Generation, measure_generation
from smelt.evaluate.last import Spread, last_checkpoints, spreads
from smelt.evaluate.paired import compare_answers
from smelt.evaluate.results import Result
from smelt.evaluate.task_model import check_model
from smelt.evaluate.tasks import read_items
from smelt.evaluate.text2text import check_text2text, read_benchmarks
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
    opened = [open_checkpoint(path, trust_remote_code=trust_remote_code) for path in paths]
    first = None
    if original is not None:
        first = open_checkpoint(original, trust_remote_code=trust_remote_code)
    for one in opened if items else ():
        check_model(one.model, one.tokenizer)
    for one in opened if asked else ():
        check_text2text(one.model)
    names = _names(opened, paths)
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
    seed = recipe.seed
    if items:
        more = measure_tasks(opened, names, items, seed=seed, device=device, stages=stages)
        paired = compare_answers(more.answers, seed=seed) if asking.compare else []
        found = replace(
            found,
            tasks=more.tasks,
            answers=more.answers,
            paired=paired,
            results=found.results + more.results,
        )
    if asked:
        more = measure_benchmarks(
            opened, names, asked, max_input=max_input, seed=seed, device=device, stages=stages
        )
        found = replace(found, benchmarks=more.benchmarks, results=found.results + more.results)
    return found


def bench(  # noqa: PLR0913 - as many as the command has options
    checkpoints: str | Path | Sequence[str | Path],
    *,
    what: Sequence[str] = (),
    batches: Sequence[int] = (1, 8, 64),
    contexts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    threads: int = 1,
    turns: int = 5,
    skip_alpha: Sequence[float] = (),
    seed: int = 0,
    trust_remote_code: bool = False,
    stages: Stages = silent,
) -> Bench:
    """What checkpoints cost to run, in turns, beside this machine's floors (docs/benchmarks.md).

        from smelt import api

        found = api.bench([source, "half"], what=["decode"], batches=[1, 8])
        for step in found.decode:
            print(step.checkpoint, step.batch, step.context, step.ms_median, step.bytes_read)
        print(found.quiet["is_quiet"], found.warnings)

    `smelt.bench.file.save` and `load` write and read what is returned.

    Args:
        what: of decode, prefill, memory and load; nothing named is everything.
        contexts: tokens in the cache; None: 0 and 512, or as many as the positions allow.
        lengths: tokens of a text to read at once; None: 128 and 512, likewise.
        dtype: float32, bfloat16 or float16; None: float32 on a CPU, bfloat16 on a GPU.
        skip_alpha: SaMoE models also without the pool entries whose |α| is below these.
    """
    paths = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    unknown = [name for name in what if name not in WHAT]
    if unknown or not paths:
        raise RecipeError(
            f"bench of {len(paths)} checkpoints, what = {list(what)}: there are {', '.join(WHAT)}, "
            "of one checkpoint at least."
        )
    chosen = check_device(device)
    shared = DecodeSettings(
        turns=turns,
        skip_alpha=tuple(skip_alpha),
        dtype=parse_dtype(dtype, chosen),
        device=chosen,
        threads=threads,
        seed=seed,
    )
    settings = BenchSettings(
        what=tuple(what) or WHAT,
        batches=tuple(batches),
        contexts=None if contexts is None else tuple(contexts),
        lengths=None if lengths is None else tuple(lengths),
        shared=shared,
    )
    sources = [str(path) for path in paths]
    return run_bench(sources, settings, trust_remote_code=trust_remote_code, stages=stages)


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
        _names(opened, checkpoints),
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


def _names(opened: Sequence[Checkpoint], paths: Sequence[str | Path]) -> list[str]:
    """What to call checkpoints: their folders' names, or their paths where those are alike."""
    names = [one.folder.name for one in opened]
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


def report(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    results: Sequence[str | Path] = (),
    bench: Sequence[str | Path] = (),
    title: str | None = None,
) -> Path:
    """One self-contained page of runs and measurements (docs/report.md); its path.

        from smelt import api

        api.report(["small"], "report.html", results=["results.json"])

    Args:
        paths: anything smelt wrote: checkpoint folders, plans, statistics, analyses, studies.
        output: the page; must not exist.
        results: files of `smelt evaluate -o`.
        bench: files of `smelt bench … -o`.
        title: of the page; None: the names of the runs.
    """
    from smelt.report.make import make_report

    return make_report(paths, output, results=results, bench=bench, title=title).path
