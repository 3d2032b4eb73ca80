"""What every benchmark reports beside its figures: the machine, tables, and a JSON file."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, cores, load, versions, date."""
    import torch

    names = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "torch_threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "scipy", "smelt")},
    }


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def times(seconds: Sequence[float]) -> dict[str, float]:
    """Minimum and median of some repeats."""
    return {"min": min(seconds), "median": median(seconds)}


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table as Markdown, numbers to three significant figures or two decimals."""
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(len(c) for c in column) for column in zip(header, *cells, strict=True)]
    print(f"\n{title}\n")
    for line in (header, ["-" * w for w in widths], *cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 10 else f"{value:,.1f}"
    return str(value)


def save(name: str, parts: dict[str, Any]) -> None:
    """Write `results/NAME.json`; parts that this run did not measure stay as they were."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(kept | parts, indent=1) + "\n")
    print(f"\nwritten: {file}")
