"""What a machine needs at least for some work: the larger of its bytes and FLOPs at its rates."""

from dataclasses import dataclass

import torch

from smelt.bench.roofline import Rates, last_cache_bytes
from smelt.bench.traffic import Work


@dataclass(frozen=True)
class Floors:
    """Milliseconds that work takes at least on a machine, and what they are made of."""

    bytes_read: float
    flops: float
    byte_floor_ms: float
    flop_floor_ms: float
    floor_ms: float  # the larger of the two
    floor_by_part_ms: float  # experts and all else one after the other
    reads_from: str  # "memory", or "cache" where all weights fit half of it


def floors(work: Work, rates: Rates, rows: int, dtype: torch.dtype, device: torch.device) -> Floors:
    """The floors of work whose products have so many rows."""
    size = dtype.itemsize
    fits = work.resident_values * size <= last_cache_bytes(device) / 2
    bandwidth = rates.cache if fits and rates.cache else rates.memory
    per_byte, per_flop = 1e3 / bandwidth, 1e3 / rates.flops_at(rows)
    by_bytes, by_flops = work.values * size * per_byte, work.flops * per_flop
    experts = max(work.expert_values * size * per_byte, work.expert_flops * per_flop)
    other = max(work.other_values * size * per_byte, work.other_flops * per_flop)
    return Floors(
        bytes_read=work.values * size,
        flops=work.flops,
        byte_floor_ms=by_bytes,
        flop_floor_ms=by_flops,
        floor_ms=max(by_bytes, by_flops),
        floor_by_part_ms=experts + other,
        reads_from="cache" if bandwidth == rates.cache else "memory",
    )
