"""All that a page is made of, read and told apart by what it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smelt.bench import file as bench_file
from smelt.bench.file import Bench
from smelt.errors import CheckpointError, RecipeError, SmeltError
from smelt.evaluate import results
from smelt.evaluate.item_files import Answers, load_answers
from smelt.evaluate.results import Result
from smelt.report.runs import (
    Run,
    Statistics,
    open_checkpoint_run,
    open_plan,
    open_statistics,
)


@dataclass(frozen=True)
class Named:
    """A JSON object by the name of the file or folder it came from."""

    name: str
    path: Path
    value: Mapping[str, Any]


@dataclass(frozen=True)
class Material:
    """What was given, each kind in the order given."""

    runs: tuple[Run, ...] = ()
    statistics: tuple[Statistics, ...] = ()
    results: tuple[Result, ...] = ()
    answers: tuple[Answers, ...] = ()  # what became of every item of tasks
    result_files: tuple[Path, ...] = ()  # of both
    benches: tuple[Bench, ...] = ()
    bench_files: tuple[Path, ...] = ()
    ranks: tuple[Named, ...] = ()  # of `smelt inspect --stable-rank --json`
    analyses: tuple[Named, ...] = ()
    studies: tuple[Named, ...] = ()


KINDS = (
    "a checkpoint folder that smelt wrote, statistics, an analysis, a study, a plan.json, results "
    "of `smelt evaluate -o` and the file of its --items, a bench file, or the JSON of `smelt "
    "inspect --stable-rank --json`"
)


def read_material(
    paths: Sequence[str | Path],
    *,
    result_files: Sequence[str | Path] = (),
    bench_files: Sequence[str | Path] = (),
) -> Material:
    """Everything that was named, read and checked.

    Args:
        result_files: must be results.
        bench_files: must be bench files.

    Raises:
        SmeltError: something that is missing, damaged, or of another kind.
    """
    parts: dict[str, list[Any]] = {}
    for path in paths:
        kind, value = _read(_existing(path))
        _add(parts, kind, value, Path(path))
    for wanted, files in (("results", result_files), ("benches", bench_files)):
        for path in files:
            kind, value = _read(_existing(path))
            if kind != wanted:
                raise RecipeError(
                    f"{path}: holds no {'results' if wanted == 'results' else 'benchmark'}. "
                    f"{'--results' if wanted == 'results' else '--bench'} takes a file of "
                    f"`smelt {'evaluate' if wanted == 'results' else 'bench …'} -o FILE`."
                )
            _add(parts, kind, value, Path(path))
    found = Material(**{name: tuple(values) for name, values in parts.items()})
    _check_answers(found)
    runs = tuple(_with_usage(run, found.statistics) for run in _unique(found.runs))
    return replace(found, runs=runs)


def _add(parts: dict[str, list[Any]], kind: str, value: Any, path: Path) -> None:
    held = parts.setdefault(kind, [])
    if kind in ("results", "answers"):
        held.extend(value)
        parts.setdefault("result_files", []).append(path)
    else:
        held.append(value)
        if kind == "benches":
            parts.setdefault("bench_files", []).append(path)


def _check_answers(found: Material) -> None:
    """Refuse items that no result was made of: they would be left out without a word."""
    if found.answers and not {a.fingerprint for a in found.answers} & {
        r.fingerprint for r in found.results
    }:
        names = ", ".join(one.name for one in found.answers)
        raise RecipeError(
            f"There are items of {names}, and no results of any of them. Name the file of "
            "`smelt evaluate -o FILE` that was made with these --items, too."
        )


def _existing(path: str | Path) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise RecipeError(f"{path}: there is no such file or folder. Check the path.")
    return found.resolve()


def _read(path: Path) -> tuple[str, Any]:
    """The kind of what lies at a path, as a field of Material, and its value."""
    if path.is_dir():
        return _read_folder(path)
    value = _read_object(path)
    if value.get("kind") == "items":
        return "answers", load_answers(path)
    if "results" in value:
        return "results", results.load(path)
    if bench_file.is_bench(value):
        return "benches", bench_file.load(path)
    if "stable_rank" in value:
        return "ranks", Named(path.stem, path, value)
    if {"form", "method", "layers"} <= value.keys():
        return "runs", open_plan(path)
    if {"variants", "runs"} <= value.keys():
        return "analyses", Named(path.parent.name, path, value)
    if _is_study(value):
        return "studies", Named(path.parent.name, path, value)
    raise RecipeError(f"{path}: is none of what a report is made of: {KINDS}.")


def _read_folder(folder: Path) -> tuple[str, Any]:
    if folder.name.endswith(".partial"):
        raise CheckpointError(
            f"{folder}: is not finished. Run the command that makes it once more: it goes on "
            "where it stopped."
        )
    if (folder / "stats.json").is_file():
        return "statistics", open_statistics(folder)
    if (folder / "config.json").is_file():
        return "runs", open_checkpoint_run(folder)
    for name in ("analysis.json", "tables.json", "plan.json"):
        if (folder / name).is_file():
            return _read(folder / name)
    raise RecipeError(f"{folder}: is none of what a report is made of: {KINDS}.")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SmeltError(
            f"{path}: is no JSON file that can be read ({reason}). A report is made of: {KINDS}."
        ) from None
    if not isinstance(value, dict):
        raise SmeltError(f"{path}: is none of what a report is made of: {KINDS}.")
    return value


def _is_study(value: Mapping[str, Any]) -> bool:
    return "unfinished" in value and bool({"rows", "tables"} & value.keys())


def _unique(runs: Sequence[Run]) -> list[Run]:
    """The runs, each by the shortest end of its path that no other has."""
    for length in range(1, 1 + max((len(run.path.parts) for run in runs), default=0)):
        names = ["/".join(_place(run).parts[-length:]).removesuffix(".json") for run in runs]
        if len(set(names)) == len(names):
            return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    if len(runs) > 1:
        raise RecipeError("One run was named twice. Name each once.")
    return list(runs)


def _place(run: Run) -> Path:
    """What a run is named after: of a plan.json, the folder that holds it."""
    path = run.path
    while path.name in ("plan.json", "smelt") and len(path.parts) > 2:
        path = path.parent
    return path


def _with_usage(run: Run, statistics: Sequence[Statistics]) -> Run:
    for one in statistics:
        run = run.with_usage(one)
    return run
