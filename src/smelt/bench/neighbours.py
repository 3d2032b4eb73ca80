"""What other processes did while something was measured, by the kernel's own count."""

import os
import time
from pathlib import Path

from smelt.bench.quiet import Neighbours


class Watch:
    """From its making to `seen`: who else used the processors."""

    def __init__(self) -> None:
        self._before, self._load = _jiffies(), _load()
        self._own, self._begin = _own_seconds(), time.perf_counter()

    def seen(self) -> Neighbours:
        """What they did; parts that the system does not tell are None."""
        cores, after = os.cpu_count() or 1, _jiffies()
        others = steal = None
        if self._before is not None and after is not None:
            busy, stolen, total = (b - a for a, b in zip(self._before, after, strict=True))
            ticks = os.sysconf("SC_CLK_TCK")
            own = (_own_seconds() - self._own) * ticks
            if total > 0:
                others, steal = max(0.0, busy - own) / total, stolen / total
        return Neighbours(cores, self._load, _load(), others, steal)


def _jiffies() -> tuple[int, int, int] | None:
    """Ticks of all processors so far: at work, taken by the host, in all."""
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
        user, nice, system, idle, wait, irq, soft, steal = map(int, line.split()[1:9])
    except (OSError, ValueError, IndexError):
        return None
    busy = user + nice + system + irq + soft
    return busy, steal, busy + idle + wait + steal


def _own_seconds() -> float:
    """Of the processors, by this process and those that it waited for."""
    return sum(os.times()[:4])


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None
