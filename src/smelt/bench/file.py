"""Bench files: one JSON for a run, read back by one function."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from smelt.bench.records import CheckpointCost, DecodeStep, PrefillRun, Timed
from smelt.bench.roofline import Rates
from smelt.errors import SmeltError

VERSION = 2
"""Of the file; version 1 had decode steps alone."""


@dataclass(frozen=True)
class Bench:
    """A run: what was measured of each checkpoint, and of the machine."""

    machine: Mapping[str, Any]
    rates: Rates | None  # None: nothing was timed
    processor_rates: Rates | None  # per second of the processor
    quiet: Mapping[str, Any]  # `smelt.bench.quiet.Quiet`; empty: not told
    checkpoints: Sequence[CheckpointCost] = ()
    decode: Sequence[DecodeStep] = ()
    prefill: Sequence[PrefillRun] = ()
    warnings: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        return {"version": VERSION, "kind": "bench", **asdict(self)}

    def beside(
        self,
        costs: Sequence[CheckpointCost],
        steps: Sequence[DecodeStep],
        engine: Mapping[str, str],
    ) -> "Bench":
        """The run, and what another engine took: its name and version go to the machine's."""
        about = {**self.machine, "versions": {**self.machine["versions"], **engine}}
        return replace(
            self,
            machine=about,
            checkpoints=[*self.checkpoints, *costs],
            decode=[*self.decode, *steps],
        )

    def points(self) -> list[dict[str, Any]]:
        """A roofline's points, one for each cell whose bytes and FLOPs are known."""
        cells: list[tuple[str, Timed]] = [
            *((f"decode, batch {s.batch}, context {s.context}", s) for s in self.decode),
            *((f"prefill, length {p.length}", p) for p in self.prefill),
        ]
        return [
            {
                "checkpoint": one.checkpoint,
                "fingerprint": one.fingerprint,
                "cell": name,
                "flops_per_byte": one.flops / one.bytes_read,
                "flops_per_second": one.flops / one.ms_median * 1e3,
                "bytes_per_second": one.bytes_read / one.ms_median * 1e3,
            }
            for name, one in cells
            if one.flops is not None and one.bytes_read
        ]


def save(found: Bench, path: Path) -> None:
    """Write a run as JSON; a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found.to_dict(), indent=1, ensure_ascii=False)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise SmeltError(f"{path}: the results cannot be written there ({error}).") from None


def load(path: str | Path) -> Bench:
    """The run of a file, of version 2 or 1 (decode steps without fingerprints).

    Raises:
        SmeltError: not such a file, or of a later version.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found.get("version", 1) == 1 and "steps" in found:
            unknown = {"fingerprint": None}
            found |= {"version": 1, "decode": [unknown | step for step in found["steps"]]}
        elif found.get("kind") != "bench":
            raise SmeltError(f"{path}: not a bench file. `smelt bench A B -o FILE` makes one.")
        elif found["version"] != VERSION:
            raise SmeltError(
                f"{path}: a bench file of version {found['version']}, and this smelt reads 1 and "
                f"{VERSION}."
            )
        return Bench(
            machine=found["machine"],
            rates=_rates(found["rates"]),
            processor_rates=_rates(found["processor_rates"]),
            quiet=found.get("quiet", {}),
            checkpoints=[CheckpointCost(**one) for one in found.get("checkpoints", ())],
            decode=[DecodeStep(**_frozen(one)) for one in found.get("decode", ())],
            prefill=[PrefillRun(**_frozen(one)) for one in found.get("prefill", ())],
            warnings=found.get("warnings", ()),
            settings=found.get("settings", {}),
        )
    except FileNotFoundError:
        raise SmeltError(f"{path}: there is no such bench file. Check the path.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SmeltError(f"{path}: cannot be read as a bench file ({error}).") from None


def _rates(values: Mapping[str, Any] | None) -> Rates | None:
    if values is None:
        return None
    flops = {int(rows): rate for rows, rate in values["flops"].items()}
    return Rates(**{**values, "flops": flops})


def _frozen(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry with tuples where JSON has lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
