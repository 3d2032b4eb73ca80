"""Bench files: one JSON for a run, read back by one function."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from smelt.bench.records import CheckpointCost, DecodeStep, PrefillRun, Timed
from smelt.bench.roofline import Rates
from smelt.errors import SmeltError
from smelt.outputs import write_text

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

    @property
    def cells(self) -> list[Timed]:
        """All that was timed."""
        return [*self.decode, *self.prefill]

    @property
    def doubts(self) -> list[str]:
        """Why the machine was not quiet; none: it was, or that was not told."""
        return [] if self.quiet.get("is_quiet", True) else list(self.quiet.get("reasons", ()))

    @property
    def remarks(self) -> list[str]:
        """What else was warned of."""
        return [text for text in self.warnings if not text.startswith("not quiet")]

    def points(self) -> list[dict[str, Any]]:
        """A roofline's points, one for each cell whose bytes and FLOPs are known."""
        return [
            {
                "checkpoint": one.checkpoint,
                "fingerprint": one.fingerprint,
                "cell": one.name,
                "flops_per_byte": one.flops / one.bytes_read,
                "flops_per_second": one.flops / one.ms_median * 1e3,
                "bytes_per_second": one.bytes_read / one.ms_median * 1e3,
            }
            for one in self.cells
            if one.flops is not None and one.bytes_read
        ]


def save(found: Bench, path: Path) -> None:
    """Write a run as JSON; a reader never sees half of it."""
    write_text(path, json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")


def load(path: str | Path) -> Bench:
    """The run of a file.

    Raises:
        SmeltError: not such a file, of another version, edited or cut short.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SmeltError(f"{path}: there is no such bench file. Check the path.") from None
    except (OSError, ValueError) as error:
        raise SmeltError(f"{path}: cannot be read as a bench file ({error}).") from None
    if not (isinstance(found, dict) and is_bench(found)):
        raise SmeltError(f"{path}: not a bench file. `smelt bench A B -o FILE` makes one.")
    if found.get("version", 1) != VERSION:
        raise SmeltError(
            f"{path}: a bench file of version {found.get('version', 1)}, and this smelt reads "
            f"{VERSION}. Measure again with `smelt bench A B -o FILE`."
        )
    try:
        return _BENCH.validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SmeltError(
            f"{path}: {where}: {first['msg']}. The bench file was edited or cut short: measure "
            "again with `smelt bench A B -o FILE`."
        ) from None


def is_bench(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object means to be a bench file, this version's or the first one's."""
    return value.get("kind") == "bench" or {"steps", "rates", "machine"} <= value.keys()


_BENCH = TypeAdapter(Bench)
