"""The memory of this process, by the kernel's table."""

import resource
import sys
from pathlib import Path


def resident(name: str) -> int:
    """Bytes by the kernel's table: `VmRSS` now, `VmHWM` at most; elsewhere the peak so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """The kernel begins anew to note the peak; where it cannot, what was before counts too."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
