"""What models made of every item, in a file: to compare two that were asked at different times."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from smelt.checkpoint.source import Checkpoint
from smelt.errors import SmeltError
from smelt.evaluate.aggregates import AGGREGATES
from smelt.evaluate.outcomes import Outcome
from smelt.evaluate.results import digest, read, write

VERSION = 1
"""Of the file."""


@dataclass(frozen=True)
class Answers:
    """What one checkpoint made of the items of some tasks."""

    name: str
    fingerprint: str
    dtype: str
    device: str
    outcomes: tuple[Outcome, ...]
    time: str = ""  # UTC, ISO 8601


def answers_of(
    checkpoint: Checkpoint, name: str, outcomes: Sequence[Outcome], *, device: str = "cpu"
) -> Answers:
    """The outcomes of a checkpoint that was asked just now."""
    return Answers(
        name=name,
        fingerprint=checkpoint.fingerprint,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        device=device,
        outcomes=tuple(outcomes),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def save_answers(answers: Sequence[Answers], path: str | Path) -> None:
    """Write outcomes as JSON, at once or not at all. Those without columns are left out."""
    entries = [
        {
            "checkpoint": one.name,
            "fingerprint": one.fingerprint,
            "dtype": one.dtype,
            "device": one.device,
            "time": one.time,
            "outcomes": [_entry(outcome) for outcome in one.outcomes if outcome.aggregate],
        }
        for one in answers
    ]
    value = {"version": VERSION, "kind": "items", "sha256": digest(entries), "items": entries}
    write(value, path, indent=None)


def _entry(outcome: Outcome) -> dict[str, Any]:
    return {
        "task": outcome.task,
        "metric": outcome.metric,
        "aggregate": outcome.aggregate,
        "unit": outcome.unit,
        "source": outcome.source,
        "sha256": outcome.sha256,
        "chance": outcome.chance,
        "num_cut": outcome.num_cut,
        "harness": dict(outcome.harness),
        "names": list(outcome.names),
        "columns": [[round(x, 6) for x in row] for row in outcome.columns.tolist()],
    }


def load_answers(path: str | Path) -> list[Answers]:
    """The outcomes of a file, or a SmeltError that says what is wrong with it."""
    entries = read(path, "items", VERSION)
    try:
        return [
            Answers(
                name=str(entry["checkpoint"]),
                fingerprint=str(entry["fingerprint"]),
                dtype=str(entry["dtype"]),
                device=str(entry["device"]),
                outcomes=tuple(_outcome(one) for one in entry["outcomes"]),
                time=str(entry["time"]),
            )
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SmeltError(f"{path}: cannot be read as outcomes by item ({error}).") from None


def _outcome(entry: dict[str, Any]) -> Outcome:
    columns = np.array(entry["columns"], dtype=np.float64)
    names = tuple(str(name) for name in entry["names"])
    if entry["aggregate"] not in AGGREGATES or columns.ndim != 2 or len(columns) != len(names):
        raise ValueError(f"no table of {entry['task']} {entry['metric']}")
    return Outcome(**entry | {"columns": columns, "names": names})


def holds_items(path: str | Path) -> bool:
    """Whether a file is one of outcomes by item, and not one of results."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whoever reads it says what is wrong
    return isinstance(found, dict) and found.get("kind") == "items"
