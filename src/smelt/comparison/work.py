"""The process of one job: `python -m smelt.comparison.work FILE.yaml`."""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smelt.comparison.work_settings import Work
from smelt.study.store import read, write


def main(words: list[str]) -> int:
    """Do one job; returns the exit code: 0 done, 2 the input is at fault, 1 our mistake.

    Args:
        words: the file that says what is to be done.
    """
    from smelt.study.work import guarded

    return guarded(lambda: _do(Path(words[0])))


def _do(path: Path) -> None:
    from smelt.settings import load_recipe

    do(load_recipe(path, Work))


def do(work: Work) -> None:
    """All of a job that is not done yet; what a kill left is gone on with."""
    result = Path(work.result)
    found = read(result) or {}
    if found.get("is_done"):
        return
    clock = _Clock(found.setdefault("seconds", {}))
    if work.train is not None:
        clock("fine-tune", lambda: _trained(work))
    if work.kind == "start":
        write(result, found | {"is_done": True, "settings": _settings(work)})
        return
    if work.kind == "trial":
        _try(work, found, clock)
    else:
        _make(work, clock)
        found["full"] = _fingerprint(work)
        if "metrics" not in found:
            _measured(work, found, clock)
            write(result, found)
    if work.calibration is not None:
        clock("statistics", lambda: _statistics(work))
    write(result, found | {"is_done": True, "settings": _settings(work)})


def _fingerprint(work: Work) -> str:
    """That of the full model: itself, or the one a variant is made from."""
    from smelt.checkpoint.source import Checkpoint

    return Checkpoint.open(work.model if work.kind == "full" else work.full).fingerprint


class _Clock:
    """Seconds of what was done, by name; what a kill cut short is not in them."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def __call__(self, name: str, job: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = job()
        self.seconds[name] = round(time.perf_counter() - begin, 2)
        return found


def _settings(work: Work) -> dict[str, Any]:
    return work.model_dump(mode="json")


def _trained(work: Work) -> None:
    from smelt.train.trainer import train

    assert work.train is not None
    folder = Path(work.model)
    if not (folder / "smelt" / "training.json").is_file():
        train(work.train)
    shutil.rmtree(folder / "smelt" / "checkpoints", ignore_errors=True)


def _statistics(work: Work) -> None:
    from smelt.checkpoint.source import Checkpoint
    from smelt.compress.pipeline import run_calibration

    folder = Path(work.stats)
    if (folder / "stats.json").is_file() or work.calibration is None:
        return
    calibrated = run_calibration(Checkpoint.open(work.model), work.calibration)
    calibrated.stats.save(folder)


# --- making --------------------------------------------------------------------------------------


def _make(work: Work, clock: _Clock) -> None:
    """Compress and heal, each if it is asked for and not done."""
    final = Path(work.model)
    if _is_there(final):
        return
    if work.compress is None and work.heal is None:
        _need(final)
    if work.compress is not None and not _is_there(Path(work.compress.output)):
        clock("compress", lambda: _compress(work))
    if work.heal is not None:
        from smelt.train.heal import heal

        recipe = work.heal
        _need(Path(recipe.student))
        _need(Path(recipe.teacher))
        clock("heal", lambda: heal(recipe))


def _compress(work: Work) -> None:
    from smelt.compress.calibrate import RoutingStats
    from smelt.compress.pipeline import run_compress

    assert work.compress is not None
    _need(Path(work.source))
    stats = RoutingStats.load(work.stats)
    run_compress(work.compress, stats=stats, verify=False)


def _is_there(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _need(folder: Path) -> None:
    from smelt.errors import CheckpointError

    if not _is_there(folder):
        raise CheckpointError(
            f"{folder}: has no weights (any more: a comparison removes what nothing needs). Run "
            "the same command again: it makes them anew."
        )


# --- measuring -----------------------------------------------------------------------------------


def _measured(work: Work, found: dict[str, Any], clock: _Clock) -> None:
    """Metrics, costs, plan and healing into `found`; what each unit got goes to its own file."""
    from smelt.comparison.costs import costs
    from smelt.comparison.measure import measure

    assert work.ask is not None
    ask, result = work.ask, Path(work.result)
    measured = clock("measure", lambda: measure(work.model, ask))
    values = {name: one.pop("values") for name, one in measured["metrics"].items()}
    write(outcomes_file(result), {"values": values, "answers": measured.pop("answers", {})})
    found |= measured
    found["costs"] = clock("count", lambda: costs(work.model))
    own = Path(work.model) / "smelt"
    plan = read(own / "plan.json")
    if plan is not None:
        found["plan"] = {
            layer["name"]: {name: layer[name] for name in ("operator", "dominants", "labels")}
            for layer in plan["layers"]
        }
        found["method"] = plan["method"]
        found["predicted"] = plan["predicted"]
    healing = read(own / "healing.json")
    if healing is not None:
        found["healing"] = healing
    found["learning_rate"] = None if work.heal is None else work.heal.rate
    if work.heal is not None:
        shutil.rmtree(Path(work.model).with_name(Path(work.model).name + ".merged"), True)


def outcomes_file(result: Path) -> Path:
    """Where the values by unit and the answers of a cell lie: beside its result."""
    return result.with_name(f"{result.name.removesuffix('.json')}.outcomes.json")


def _try(work: Work, found: dict[str, Any], clock: _Clock) -> None:
    """A trial of a rate: what it reaches on the part for choosing; its weights go."""
    from smelt.comparison.measure import is_lower_better, measure
    from smelt.train.faults import DivergedError

    assert work.ask is not None and work.ask.part == "choose"
    ask, folder = work.ask, Path(work.model)
    try:
        _make(work, clock)
    except DivergedError as error:
        found["diverged"] = str(error)
    else:
        metrics = clock("measure", lambda: measure(folder, ask))["metrics"]
        name = next(iter(metrics))
        value = metrics[name]["value"]
        after = (read(folder / "smelt" / "healing.json") or {}).get("after", {})
        nats = [one["nats_per_token"] for one in after.values()]
        found |= {"metric": name, "value": value, "nats": sum(nats) / max(len(nats), 1)}
        found["loss"] = value if is_lower_better(name) else -value
    for left in (folder, *(folder.with_name(folder.name + end) for end in (".merged", ".partial"))):
        shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
