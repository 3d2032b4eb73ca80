"""Reading a bench file: what checkpoints cost to run, by their fingerprints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smelt.errors import SmeltError

VERSION = 2


class _Open(BaseModel):
    """Frozen; further fields are allowed and left alone: a bench file may hold more."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Cost(_Open):
    """What one checkpoint weighs."""

    checkpoint: str
    fingerprint: str
    folder_bytes: int | None = Field(default=None, ge=0)
    parameters: int | None = Field(default=None, ge=0)
    active_parameters: int | None = Field(default=None, ge=0)
    flops_per_token: float | None = Field(default=None, ge=0)
    load_seconds: float | None = Field(default=None, ge=0)
    peak_memory_bytes: float | None = Field(default=None, ge=0)


class Timed(_Open):
    """What was timed of one checkpoint."""

    checkpoint: str
    fingerprint: str
    batch: int = Field(default=1, ge=1)
    ms: float | None = Field(default=None, ge=0)
    ms_median: float | None = Field(default=None, ge=0)
    bytes_read: float | None = Field(default=None, ge=0)
    bytes_predicted: float | None = Field(default=None, ge=0)
    flops: float | None = Field(default=None, ge=0)
    reads_from: str | None = None  # "memory", or "cache" where all weights fit there
    distinct_experts: tuple[float, ...] | None = None

    @property
    def time(self) -> float | None:
        """The median where it is known, or the fastest turn."""
        return self.ms if self.ms_median is None else self.ms_median

    @property
    def num_bytes(self) -> float | None:
        """What a step reads: of the experts that were reached, or by uniform routing."""
        return self.bytes_predicted if self.bytes_read is None else self.bytes_read

    @property
    def name(self) -> str:
        """What was timed, in words."""
        return f"batch {self.batch}"

    @property
    def num_rows(self) -> int:
        """Rows of input at a time."""
        return self.batch


class Step(Timed):
    """A decode step at one batch and context."""

    context: int = Field(ge=0)

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}, context {self.context}"


class Prefill(Timed):
    """How fast a prompt is read."""

    length: int | None = None
    tokens_per_second: float | None = Field(default=None, ge=0)

    @property
    def name(self) -> str:
        return f"prefill, batch {self.batch}, length {self.length}"

    @property
    def num_rows(self) -> int:
        return self.batch * (self.length or 1)


class Bench(_Open):
    """A run of `smelt bench`."""

    machine: Mapping[str, Any] = {}
    rates: Mapping[str, Any] | None = None  # None: nothing was timed
    quiet: Mapping[str, Any] | None = None
    checkpoints: tuple[Cost, ...] = ()
    decode: tuple[Step, ...] = ()
    prefill: tuple[Prefill, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def memory_rate(self) -> float | None:
        """Bytes per second out of memory."""
        return _positive((self.rates or {}).get("memory"))

    @property
    def cache_rate(self) -> float | None:
        """Bytes per second out of the last cache."""
        return _positive((self.rates or {}).get("cache"))

    @property
    def doubts(self) -> list[str]:
        """Why the machine was not quiet; none: it was, or that was not told."""
        quiet = self.quiet or {}
        if quiet.get("is_quiet", True):
            return []
        return [str(reason) for reason in quiet.get("reasons") or ["it says no reason"]]

    @property
    def remarks(self) -> list[str]:
        """What else the bench warned of."""
        return [text for text in self.warnings if not text.startswith("not quiet")]

    def flop_rates(self) -> dict[int, float]:
        """FLOPs per second by rows of input."""
        found = (self.rates or {}).get("flops")
        if not isinstance(found, Mapping):
            return {}
        pairs = ((int(rows), _positive(rate)) for rows, rate in found.items())
        return {rows: rate for rows, rate in pairs if rate}


def _positive(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def is_bench(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object means to be a bench file, this version's or an older one."""
    return value.get("kind") == "bench" or {"steps", "rates", "machine"} <= value.keys()


def read_bench(path: Path, value: Mapping[str, Any] | None = None) -> Bench:
    """The bench file at a path, or a SmeltError that says what is wrong with it."""
    if value is None:
        value = json.loads(path.read_text(encoding="utf-8"))
    if value.get("kind") != "bench" or value.get("version") != VERSION:
        raise SmeltError(
            f"{path}: a bench file of version {value.get('version', 1)}, and this smelt reads "
            f"{VERSION}. Measure again with `smelt bench … -o FILE`."
        )
    try:
        return Bench.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SmeltError(
            f"{path}: {where}: {first['msg']}. The bench file was edited or cut short: measure "
            "again with `smelt bench … -o FILE`."
        ) from None
