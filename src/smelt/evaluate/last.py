"""The last checkpoints of a run of `smelt train`: how much a figure varies from one to the next."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smelt.errors import CheckpointError, RecipeError
from smelt.evaluate.results import Result


@dataclass(frozen=True)
class Spread:
    """One metric over the last checkpoints of one run."""

    run: str
    task: str
    metric: str
    values: tuple[float, ...]  # in the order of the steps

    def row(self) -> dict[str, Any]:
        """The spread as a row of a table; it is no standard error: the items are the same."""
        return {
            "run": self.run,
            "task": self.task,
            "metric": self.metric,
            "mean": statistics.fmean(self.values),
            "sd": statistics.stdev(self.values) if len(self.values) > 1 else None,
            "lowest": min(self.values),
            "highest": max(self.values),
            "checkpoints": len(self.values),
        }


def last_checkpoints(run: str | Path, num: int) -> list[Path]:
    """The folders of the last checkpoints that a run kept, in the order of their steps.

    Raises:
        RecipeError: fewer than one is asked for.
        CheckpointError: the folder is no run, or kept fewer.
    """
    if num < 1:
        raise RecipeError(f"--last {num}: ask for 1 checkpoint or more.")
    folder = Path(run).expanduser()
    home = folder / "smelt" / "checkpoints"
    steps = {}
    for path in home.glob("step-*") if home.is_dir() else ():
        number = path.name.removeprefix("step-")
        if number.isdigit() and (path / "config.json").is_file():
            steps[int(number)] = path
    if len(steps) < num:
        raise CheckpointError(
            f"{run}: holds {len(steps)} checkpoints under smelt/checkpoints, and the last {num} "
            "are asked for. Give the output folder of `smelt train`; its setting keep_checkpoints "
            "says how many stay."
        )
    return [steps[step] for step in sorted(steps)[-num:]]


def spreads(results: Sequence[Result], runs: Mapping[str, Sequence[str]]) -> list[Spread]:
    """Every metric over the checkpoints of each run.

    Args:
        runs: the fingerprints of the checkpoints of each run, in the order of their steps.
    """
    found = []
    for run, fingerprints in runs.items():
        own = [one for one in results if one.fingerprint in fingerprints]
        for task, metric in dict.fromkeys((one.task, one.metric) for one in own):
            values = {
                one.fingerprint: one.value
                for one in own
                if (one.task, one.metric) == (task, metric)
            }
            found.append(Spread(run, task, metric, tuple(values[f] for f in fingerprints)))
    return found
