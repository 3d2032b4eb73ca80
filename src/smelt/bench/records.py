"""What was measured, as named records, with all that says how."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smelt.bench.roofline import Rates
from smelt.errors import SmeltError


@dataclass(frozen=True)
class DecodeStep:
    """What was measured of one model at one batch and context; rates are of the fastest turn."""

    checkpoint: str
    skip_alpha: float | None
    kept_entries: tuple[int, ...] | None  # by MoE layer
    batch: int
    context: int
    dtype: str
    device: str
    threads: int
    turns: int
    steps: int
    ms: float  # of the fastest turn, the mean of its steps
    ms_median: float  # of the turns
    processor_ms: float  # of the turn with the least
    bytes_predicted: float | None = None  # uniform routing
    bytes_read: float | None = None  # the experts that were reached
    distinct_experts: tuple[float, ...] | None = None  # by MoE layer, the mean over the timed steps
    gigabytes_per_second: float | None = None
    flops: float | None = None
    byte_floor_ms: float | None = None
    flop_floor_ms: float | None = None
    floor_ms: float | None = None  # the larger of the two
    floor_by_part_ms: float | None = None  # experts and all else one after the other
    reads_from: str | None = None  # "memory", or "cache" where all weights fit half of it
    ratio: float | None = None  # ms ÷ floor
    processor_ratio: float | None = None  # the same by processor time, the floor's rates too


@dataclass(frozen=True)
class Decoded:
    """A run: its records, and the machine's rates they are held against."""

    steps: list[DecodeStep]
    rates: Rates
    processor_rates: Rates  # per second of the processor, where something else runs too

    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """The records as rows of a table."""
        return [
            {
                "checkpoint": s.checkpoint,
                "α ≥": s.skip_alpha,
                "batch": s.batch,
                "context": s.context,
                "ms": s.ms,
                "median": s.ms_median,
                "CPU ms": s.processor_ms,
                "MB, uniform": None if s.bytes_predicted is None else s.bytes_predicted / 1e6,
                "MB": None if s.bytes_read is None else s.bytes_read / 1e6,
                "GB/s": s.gigabytes_per_second,
                "GFLOP": None if s.flops is None else s.flops / 1e9,
                "byte floor": s.byte_floor_ms,
                "FLOP floor": s.flop_floor_ms,
                "÷ floor": s.ratio,
                "CPU ÷ floor": s.processor_ratio,
            }
            for s in self.steps
        ]


def machine(threads: int) -> dict[str, Any]:
    """The processor and what else has a say in a time."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": threads,
        "versions": {name: version(name) for name in ("smelt", "torch", "transformers")},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(found: Decoded, path: Path) -> None:
    """Write a run as JSON; a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise SmeltError(f"{path}: the results cannot be written there ({error}).") from None
