"""What checkpoints cost to run, what trained models look like inside, and all of it on a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smelt.bench.decode import DecodeSettings
from smelt.bench.file import Bench
from smelt.bench.run import WHAT, BenchSettings
from smelt.bench.run import measure as run_bench
from smelt.bench.subjects import parse_dtype
from smelt.checkpoint.device import check_device
from smelt.compress.pipeline import (
    Stages,
    silent,
)
from smelt.errors import RecipeError
from smelt.export.engine import check_writer
from smelt.export.engine import version as engine_version
from smelt.settings import check_recipe

if TYPE_CHECKING:
    from smelt.export.gguf_file import GgufFile


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
    files = [Path(path) for path in paths if Path(path).suffix == ".gguf"]
    sources = [str(path) for path in paths if Path(path).suffix != ".gguf"]
    opened = _files_to_bench(files, settings)
    found = run_bench(sources, settings, trust_remote_code=trust_remote_code, stages=stages)
    if not opened:
        return found
    from smelt.bench.gguf_decode import measure as run_files

    room = min(file.context_length for file in opened) // 2
    costs, steps = run_files(
        opened,
        contexts=(0, min(512, room)) if contexts is None else tuple(contexts),
        turns=turns,
        threads=threads,
        seed=seed,
        progress=stages("llama.cpp"),
    )
    return found.beside(costs, steps, {"xllamacpp": engine_version()})


def _files_to_bench(files: Sequence[Path], settings: BenchSettings) -> "list[GgufFile]":
    """GGUF files, opened, once it is sure that what is asked can be measured of them."""
    if not files:
        return []
    if "decode" not in settings.what or settings.shared.device.type != "cpu":
        raise RecipeError(
            f"{files[0].name}: of GGUF files decode steps alone are measured, on the CPU. Name "
            "decode, or leave the file out."
        )
    check_writer()
    from smelt.export.gguf_file import GgufFile

    return [GgufFile(file) for file in files]


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
