"""Measurements as named records with all that is needed to repeat them, and tables of records."""

import dataclasses
import functools
import hashlib
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from smelt.errors import SmeltError
from smelt.outputs import write_text

VERSION = 1
"""Of the file."""


@dataclass(frozen=True)
class Setting:
    """What measurements are made on and with."""

    text: tuple[str, ...]  # the sources, as a person names them
    text_sha256: str  # of the tokens (`TokenBlocks.sha256`)
    seed: int
    device: str = "cpu"


@dataclass(frozen=True)
class Result:
    """One measured number, and where it came from."""

    task: str  # what was done: "perplexity", "fidelity", the name of a test set
    metric: str
    value: float
    n: int  # what it is a mean of: tokens, items
    standard_error: float | None
    chance: float | None  # the value of guessing, where there is one
    seed: int
    text: tuple[str, ...]
    text_sha256: str
    checkpoint: str  # name of the folder
    fingerprint: str
    dtype: str
    device: str
    plan_sha256: str | None  # of smelt/plan.json, which holds recipe and statistics' hashes
    versions: Mapping[str, str]
    commit: str | None  # of smelt's own clone; "+" after it: with changes
    time: str  # UTC, ISO 8601
    unit: str | None = None  # what `n` counts, where it is said
    harness: Mapping[str, Any] | None = None
    """Of a task: version of lm_eval, shots, SHA-256 of all that was asked. None: no harness."""
    by_sequence: tuple[float, ...] | None = None
    """Of a loss on text: what each sequence adds to the value. Two of the same text are pairs."""


class Measured(Protocol):
    """What a record says of the thing measured: a checkpoint folder or a GGUF file."""

    @property
    def folder(self) -> Path: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dtype(self) -> object: ...


def record(
    checkpoint: Measured,
    setting: Setting,
    *,
    task: str,
    metric: str,
    value: float,
    n: int,
    standard_error: float | None = None,
    chance: float | None = None,
    by_sequence: tuple[float, ...] | None = None,
) -> Result:
    """The record of a number measured now on a checkpoint."""
    plan = checkpoint.folder / "smelt" / "plan.json"
    return Result(
        task=task,
        metric=metric,
        value=value,
        n=n,
        standard_error=standard_error,
        chance=chance,
        seed=setting.seed,
        text=setting.text,
        text_sha256=setting.text_sha256,
        checkpoint=checkpoint.folder.name,
        fingerprint=checkpoint.fingerprint,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        device=setting.device,
        plan_sha256=hashlib.sha256(plan.read_bytes()).hexdigest() if plan.is_file() else None,
        versions={name: version(name) for name in ("smelt", "torch", "transformers")},
        commit=_commit(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        by_sequence=by_sequence,
    )


@functools.cache
def _commit() -> str | None:
    """The commit of smelt's clone; None where smelt is installed otherwise."""
    package = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=package, capture_output=True, check=True, text=True, timeout=10
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) / "src" / "smelt" != package:
            return None  # installed inside some other project's clone
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def save(results: Sequence[Result], path: str | Path) -> None:
    """Write the records as JSON; a reader never sees half of them. Inf is written as null."""
    entries = [dataclasses.asdict(result) for result in results]
    for entry in entries:
        for name in ("value", "standard_error"):
            number = entry[name]
            entry[name] = number if number is not None and math.isfinite(number) else None
    write({"version": VERSION, "sha256": digest(entries), "results": entries}, path)


def write(value: Any, path: str | Path, *, indent: int | None = 1) -> None:
    """Write measurements as JSON, at once or not at all."""
    write_text(Path(path), json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def digest(entries: Any) -> str:
    """SHA-256 of measurements as compact JSON: a file says it of itself, so that edits show."""
    text = json.dumps(entries, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: str | Path, key: str, version: int) -> Any:
    """What a file of measurements holds under a key, once it is sure that nobody changed it."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["version"] != version:
            raise SmeltError(
                f"{path}: results of version {found['version']}, and this smelt reads {version}."
            )
        entries, said = found[key], found.get("sha256")
    except FileNotFoundError:
        raise SmeltError(f"{path}: there are no such results. Check the path.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SmeltError(f"{path}: cannot be read as results ({error}).") from None
    if said is not None and said != digest(entries):
        raise SmeltError(
            f"{path}: was edited after it was measured: its numbers are not those of its sha256. "
            "Restore the file, or measure again."
        )
    return entries


def load(path: str | Path) -> list[Result]:
    """The records of a file, or a SmeltError that says what is wrong with it.

    Files without a sha256, of earlier versions, are taken as they are.
    """
    try:
        return [
            _checked(
                Result(
                    **entry
                    | {
                        "value": math.inf if entry["value"] is None else entry["value"],
                        "text": tuple(entry["text"]),
                        "by_sequence": _tuple(entry.get("by_sequence")),
                    }
                )
            )
            for entry in read(path, "results", VERSION)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise SmeltError(f"{path}: cannot be read as results ({error}).") from None


def check_one_harness(results: Sequence[Result]) -> None:
    """Raise SmeltError where one metric of one task was measured in two ways.

    Numbers of one row of a table are of the same items, prompts, examples and harness. Those of
    other items, such as a subset, are none of the same thing, however alike their names are.
    """
    first: dict[tuple[str, str], Result] = {}
    for one in results:
        other = first.setdefault((one.task, one.metric), one)
        if one.harness is None and other.harness is None:
            continue
        found = differing(
            {"items": other.text_sha256, **(other.harness or {})},
            {"items": one.text_sha256, **(one.harness or {})},
        )
        if found:
            raise SmeltError(
                f"{one.task} {one.metric} of {other.checkpoint} and of {one.checkpoint} do not "
                f"compare: {found}. Measure both with the same settings, on the same items."
            )


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Which settings of two measurements differ, with both values; "": none."""
    found = []
    for name in dict.fromkeys([*ours, *theirs]):
        one, other = (str(side.get(name, "none")) for side in (ours, theirs))
        if one != other:
            short = [f"{x[:8]}…" if len(x) == 64 else x for x in (one, other)]
            found.append(f"{_TITLES.get(name, name)} {short[0]} and {short[1]}")
    return "; ".join(found)


_TITLES = {
    "items": "the items (by SHA-256)",
    "prompts": "the prompts (by SHA-256)",
    "lm_eval": "the version of lm-evaluation-harness",
    "shots": "solved examples",
    "task_version": "the version of the task",
}


def _tuple(values: list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _checked(result: Result) -> Result:
    """The record, or a ValueError that names the field that cannot be."""
    texts = ("task", "metric", "fingerprint", "text_sha256", "checkpoint")
    numbers = ("value", "n") if result.standard_error is None else ("value", "n", "standard_error")
    wrong = [name for name in texts if not isinstance(getattr(result, name), str)]
    wrong += [name for name in numbers if not isinstance(getattr(result, name), int | float)]
    if not wrong:
        wrong = [name for name in numbers[1:] if getattr(result, name) < 0]
    if wrong:
        raise ValueError(f"{result.task}: {wrong[0]} = {getattr(result, wrong[0])!r} cannot be")
    return result


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The records as rows of a table."""
    return [
        {
            "checkpoint": result.checkpoint,
            "task": result.task,
            "metric": result.metric,
            "value": result.value,
            "± se": result.standard_error,
            "chance": result.chance,
            "n": result.n,
        }
        for result in results
    ]


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Rows as an aligned Markdown table; a column for every key, in the order they first appear.

    Numbers are aligned to the right, floats have four significant digits, None is blank. A column
    without any value is left out.
    """
    keys = list(dict.fromkeys(key for row in table for key in row))
    keys = [key for key in keys if any(row.get(key) is not None for row in table)]
    if not keys:
        return ""
    columns = []
    for key in keys:
        values = [row.get(key) for row in table]
        cells = [key, *(cell(value) for value in values)]
        width = max(3, *map(len, cells))
        is_number = all(isinstance(v, int | float) or v is None for v in values)
        fitted = [c.rjust(width) if is_number else c.ljust(width) for c in cells]
        rule = "-" * (width - 1) + (":" if is_number else "-")
        columns.append([fitted[0], rule, *fitted[1:]])
    lines = ("| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True))
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """One value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < math.inf else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
