"""What was measured, as named records, with all that says how."""

import os
import platform
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from smelt.bench.roofline import Rates


@dataclass(frozen=True, kw_only=True)
class Timed(ABC):
    """What every timed cell says; rates are of the fastest turn."""

    checkpoint: str
    fingerprint: str  # empty: of a model that is no checkpoint on disk
    batch: PositiveInt
    dtype: str
    device: str
    threads: int
    turns: int
    ms: PositiveFloat  # of the fastest turn
    ms_median: PositiveFloat  # of the turns
    processor_ms: float  # of the turn with the least
    ms_turns: tuple[float, ...] = ()
    spread: float | None = None  # of two runs' medians, by the turns (`smelt.bench.quiet`)
    waiting: float | None = None  # share of the time off the processor, of one thread
    bytes_read: NonNegativeFloat | None = None  # the experts that were reached
    distinct_experts: tuple[float, ...] | None = None  # by MoE layer, the mean over what was timed
    gigabytes_per_second: float | None = None
    share_of_copy: float | None = None  # of the rate of copying memory
    flops: NonNegativeFloat | None = None
    byte_floor_ms: float | None = None
    flop_floor_ms: float | None = None
    floor_ms: float | None = None  # the larger of the two
    floor_by_part_ms: float | None = None  # experts and all else one after the other
    reads_from: str | None = None  # "memory", or "cache" where all weights fit half of it
    ratio: float | None = None  # ms ÷ floor
    processor_ratio: float | None = None  # the same by processor time, the floor's rates too

    @property
    def num_bytes(self) -> float | None:
        """What was read: of the experts that were reached, as far as that is known."""
        return self.bytes_read

    @property
    @abstractmethod
    def name(self) -> str:
        """What was timed, in words."""

    @property
    def num_rows(self) -> int:
        """Rows of input at a time."""
        return self.batch


@dataclass(frozen=True, kw_only=True)
class DecodeStep(Timed):
    """One model's steps at one batch and context; a time is the mean of a turn's steps."""

    skip_alpha: float | None = None
    kept_entries: tuple[int, ...] | None = None  # by MoE layer
    context: NonNegativeInt
    steps: int
    bytes_predicted: NonNegativeFloat | None = None  # uniform routing

    @property
    def num_bytes(self) -> float | None:
        """What a step reads: of the experts that were reached, or by uniform routing."""
        return self.bytes_predicted if self.bytes_read is None else self.bytes_read

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}, context {self.context}"


@dataclass(frozen=True, kw_only=True)
class PrefillRun(Timed):
    """One model's reading of texts of one length; a time is of the whole batch."""

    length: PositiveInt
    tokens_per_second: NonNegativeFloat  # by the median

    @property
    def name(self) -> str:
        return f"prefill, batch {self.batch}, length {self.length}"

    @property
    def num_rows(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class CheckpointCost:
    """What a checkpoint costs whatever is asked of it; None: not measured."""

    checkpoint: str
    fingerprint: str
    folder_bytes: NonNegativeInt  # weight files on disk
    dtype: str  # that was measured in, not of the files
    parameters: NonNegativeInt | None = None
    active_parameters: NonNegativeFloat | None = None  # one token's, its tables whole
    flops_per_token: NonNegativeFloat | None = None  # executed by a decode step without context
    load_seconds: NonNegativeFloat | None = None  # files in the page cache to weights on the device
    weights_memory_bytes: NonNegativeInt | None = None  # more than the process held before
    load_peak_bytes: NonNegativeInt | None = None  # while loading
    peak_memory_bytes: NonNegativeInt | None = None  # while running what `peak_of` says
    peak_of: dict[str, int] | None = None


@dataclass(frozen=True)
class Decoded:
    """Decode steps, and the machine's rates they are held against."""

    steps: list[DecodeStep]
    rates: Rates
    processor_rates: Rates  # per second of the processor, where something else runs too

    machine: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """The records as rows of a table."""
        return [decode_row(step) for step in self.steps]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        return asdict(self)


def decode_row(step: DecodeStep) -> dict[str, Any]:
    """A step as a row of a table."""
    distinct = step.distinct_experts
    return {
        "checkpoint": step.checkpoint,
        "α ≥": step.skip_alpha,
        "batch": step.batch,
        "context": step.context,
        "ms": step.ms,
        "median": step.ms_median,
        "± %": _percent(step.spread),
        "CPU ms": step.processor_ms,
        "experts": None if distinct is None else sum(distinct) / len(distinct),
        "MB, uniform": _scaled(step.bytes_predicted, 1e6),
        **_held(step),
    }


def prefill_row(run: PrefillRun) -> dict[str, Any]:
    """A prefill as a row of a table."""
    return {
        "checkpoint": run.checkpoint,
        "batch": run.batch,
        "length": run.length,
        "tokens/s": run.tokens_per_second,
        "ms": run.ms,
        "median": run.ms_median,
        "± %": _percent(run.spread),
        "CPU ms": run.processor_ms,
        **_held(run),
    }


def _held(one: Timed) -> dict[str, Any]:
    return {
        "MB": _scaled(one.bytes_read, 1e6),
        "GB/s": one.gigabytes_per_second,
        "% of copy": _percent(one.share_of_copy),
        "GFLOP": _scaled(one.flops, 1e9),
        "byte floor": one.byte_floor_ms,
        "FLOP floor": one.flop_floor_ms,
        "÷ floor": one.ratio,
        "CPU ÷ floor": one.processor_ratio,
    }


def cost_row(cost: CheckpointCost) -> dict[str, Any]:
    """A checkpoint's costs as a row of a table."""
    return {
        "checkpoint": cost.checkpoint,
        "MB on disk": cost.folder_bytes / 1e6,
        "M parameters": _scaled(cost.parameters, 1e6),
        "M active": _scaled(cost.active_parameters, 1e6),
        "MFLOP per token": _scaled(cost.flops_per_token, 1e6),
        "load s": cost.load_seconds,
        "MB of weights": _scaled(cost.weights_memory_bytes, 1e6),
        "peak MB, loading": _scaled(cost.load_peak_bytes, 1e6),
        "peak MB, running": _scaled(cost.peak_memory_bytes, 1e6),
    }


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def machine(threads: int, device: torch.device | None = None) -> dict[str, Any]:
    """The processor and what else has a say in a time."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    has_gpu = device is not None and device.type == "cuda"
    return {
        "processor": names[0] if names else platform.processor(),
        "gpu": torch.cuda.get_device_name(device) if has_gpu else None,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": threads,
        "versions": {name: version(name) for name in ("smelt", "torch", "transformers")},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
