"""Whether `smelt bench` finds the same twice: medians of two runs, one after the other.

    python benchmarks/bench_repeat.py [CHECKPOINT...] [--turns N] [--quick]

Each run is a process of its own. Bound: on a quiet machine the medians of a cell differ by at most
5 %, and where they differ by more a run has said that the machine is not quiet. A cell that differs
by more while both runs call the machine quiet fails. Without a checkpoint: the embedded one, and
one of random weights that is large enough to measure (two wide layers of 16 experts, 0.6 GB).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _checkpoints import EMBEDDED, qwen3, write_checkpoint
from _report import machine, save, show
from smelt.bench import file
from smelt.bench.file import Bench
from smelt.bench.quiet import SPREAD

WIDE: dict[str, Any] = qwen3(
    num_hidden_layers=2,
    hidden_size=1024,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=1536,
    vocab_size=4096,
)


def run(checkpoints: list[str], output: Path, turns: int, *, quick: bool) -> Bench:
    """One run of decode and prefill in a process of its own."""
    sizes = (
        ["--batch", "1", "--context", "0"] if quick else ["--batch", "1,8", "--context", "0,256"]
    )
    words = ["bench", "decode", "prefill", *checkpoints, *sizes, "--length", "128", "-q"]
    words += ["--repeats", str(turns), "-o", str(output)]
    subprocess.run([sys.executable, "-m", "smelt", *words], check=True)
    return file.load(output)


def cells(found: Bench) -> dict[str, Any]:
    """Every timed cell by its name."""
    steps = {f"{s.checkpoint}, batch {s.batch}, context {s.context}": s for s in found.decode}
    return steps | {f"{p.checkpoint}, prefill {p.length}": p for p in found.prefill}


def compare(first: Bench, second: Bench) -> list[dict[str, Any]]:
    """By cell: both medians, their ratio by either clock, and what the first run foresaw."""
    others = cells(second)
    return [
        {
            "cell": name,
            "ms": [one.ms_median, others[name].ms_median],
            "ratio": others[name].ms_median / one.ms_median,
            "processor_ratio": others[name].processor_ms / one.processor_ms,
            "foreseen": one.spread,
        }
        for name, one in cells(first).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="*")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the embedded checkpoint, few turns")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smelt-bench-") as folder:
        chosen = options.checkpoints
        if not chosen:
            chosen = [str(EMBEDDED)]
            if not options.quick:
                chosen.append(str(write_checkpoint(Path(folder) / "wide", WIDE, "bfloat16")))
        turns = 4 if options.quick else options.turns
        first, second = (
            run(chosen, Path(folder) / f"{name}.json", turns, quick=options.quick)
            for name in ("first", "second")
        )
    rows = compare(first, second)
    header = ("cell", "median, ms", "again", "again ÷ first", "by CPU time", "foreseen, ±")
    lines = [
        (r["cell"], *r["ms"], r["ratio"], r["processor_ratio"], f"{r['foreseen'] or 0:.0%}")
        for r in rows
    ]
    show("The same twice", header, lines)
    beyond = [r["cell"] for r in rows if abs(r["ratio"] - 1) > SPREAD]
    is_quiet = first.quiet["is_quiet"] and second.quiet["is_quiet"]
    print(f"\n{len(rows) - len(beyond)} of {len(rows)} cells within {SPREAD:.0%}")
    for number, found in enumerate((first, second), 1):
        said = "; ".join(found.quiet["reasons"]) or "quiet"
        print(f"run {number}: {said}")
    if not options.quick:
        save("bench_repeat", {"runs": {"machine": machine(), "cells": rows, "is_quiet": is_quiet}})
    if beyond and is_quiet:
        raise SystemExit(f"Called quiet, and beyond {SPREAD:.0%}: {'; '.join(beyond)}")


if __name__ == "__main__":
    main()
