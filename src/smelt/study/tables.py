"""The results of a study as one value for machines: rows, differences, power, fits, equal cost."""

import statistics as plain
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from smelt.study.cells import cells
from smelt.study.costs import fits, matched
from smelt.study.rows import Row, gather
from smelt.study.schedule import rates, states
from smelt.study.settings import OWN, StudyRecipe
from smelt.study.statistics import (
    Noise,
    detectable,
    paired,
    pooled,
    seeds_needed,
    summary,
)
from smelt.study.store import Store, write

SEEDS = range(2, 21)
"""Numbers of seeds for which the smallest resolved effect is given."""


def results(study: StudyRecipe, only: str | None = None) -> dict[str, Any]:
    """All that can be said of the cells that are done; written to OUTPUT/tables.json too.

    Args:
        study: whose cells.
        only: a part.
    """
    store = Store(study.output)
    rows = gather(study, only)
    noise = seed_noise(study, rows)
    found = {
        "rows": [_row(row) for row in rows if not row.is_twin],
        "learning_rates": _rates(study, store, only),
        "differences": differences(study, rows),
        "noise": {name: asdict(one) for name, one in noise.items()},
        "power": power(study, noise, rows),
        "fits": fits(study, rows),
        "matched": matched(study, rows, noise.get("run")),
        "finetune": _finetune(rows),
        "unfinished": {
            name: state
            for name, state in states(study, store, cells(study, only)).items()
            if state != "done"
        },
    }
    if store.folder.is_dir():
        write(store.folder / "tables.json", found)
    return found


def _row(row: Row) -> dict[str, Any]:
    config, runs = row.config, list(row.runs.values())
    sources = runs[0].by_source
    return {
        "row": row.id,
        "seeds": sorted(row.runs),
        "seeds_asked": row.asked,
        "parameters": row.parameters,
        "active_parameters": None if config is None else config.num_active_params(),
        "flops_per_token": row.flops_per_token,
        "tokens": row.tokens,
        "learning_rate": runs[0].learning_rate,
        "nats": asdict(row.loss),
        "nats_by_seed": row.nats,
        "nats_by_source": {
            name: asdict(summary([run.by_source[name] for run in runs])) for name in sources
        },
        "nats_sd_of_last_checkpoints": row.spread_of_last,
        "tasks": _tasks(row),
        "training_tokens_per_second": plain.median(run.tokens_per_second for run in runs),
        "peak_memory_bytes": plain.median(run.peak_memory_bytes for run in runs),
        "decode_milliseconds": dict(row.decode),
    }


def _tasks(row: Row) -> dict[str, Any]:
    """Per task, its first metric over the seeds that were asked.

    The standard error is of the items (root mean square over seeds): all seeds answer the same
    ones, so that more seeds do not make it smaller. The spread over seeds stands beside it.
    """
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for run in row.runs.values():
        for task, one in run.evaluation["tasks"].items():
            asked.setdefault(task, []).append(one["scores"][0])
    found = {}
    for task, scores in asked.items():
        over = summary([score["value"] for score in scores])
        errors = [score["standard_error"] for score in scores]
        squares = [error**2 for error in errors if error is not None]
        found[task] = {
            "metric": scores[0]["metric"],
            "mean": over.mean,
            "standard_error": (sum(squares) / len(squares)) ** 0.5 if squares else None,
            "sd_over_seeds": over.sd,
            "n": scores[0]["n"],
            "chance": scores[0]["chance"],
            "seeds": len(scores),
            "source": scores[0]["source"],
        }
    return found


def _finetune(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Per row and task, accuracy and F1 over the seeds of pre-training."""
    found = []
    for row in rows:
        by_task: dict[str, list[Mapping[str, Any]]] = {}
        for run in row.runs.values():
            for name, one in run.evaluation["finetune"].items():
                by_task.setdefault(name.rpartition("/")[0], []).append(one)
        for task, ones in by_task.items():
            first = ones[0]
            found.append(
                {
                    "row": row.id,
                    "task": task,
                    "runs": len(ones),
                    "accuracy": asdict(summary([one["accuracy"] for one in ones])),
                    "f1": asdict(summary([one["f1"] for one in ones])),
                    "standard_error": first["standard_error"],
                    "n": first["n"],
                    "chance": first["chance"],
                    "majority": first["majority"],
                }
            )
    return found


def _rates(study: StudyRecipe, store: Store, only: str | None) -> list[dict[str, Any]]:
    found = []
    for name, part in study.parts.items():
        if part.search == OWN and only in (None, name):
            state = rates(study, store, name)
            for key, nats in state.nats.items():
                by_rate = {f"{rate:g}": nats.get(rate) for rate in state.grid}
                one = {"search": key, "nats": by_rate, "chosen": state.chosen.get(key)}
                found.append(one)
    return found


# --- differences and power -----------------------------------------------------------------------


def differences(study: StudyRecipe, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every row less the reference at the same point of its part, and less the row beside it."""
    by_id = {row.id: row for row in gather(study)}
    found = []
    for row in rows:
        point = row.id.removeprefix(f"{row.part}/{row.variant}")
        others = [f"{row.part}/{study.reference}{point}"]
        beside = study.parts[row.part].beside_of(row.variant)
        if beside is not None:
            others.append(beside)
        for name in dict.fromkeys(others):
            other = by_id.get(name)
            if other is None or other.id == row.id:
                continue
            one = paired(row.nats, other.nats)
            if one is not None:
                found.append({"row": row.id, "less": name, **asdict(one)})
    return found


def seed_noise(study: StudyRecipe, rows: Sequence[Row]) -> dict[str, Noise]:
    """Of the first part with several seeds: of a run, and of a paired difference.

    The differences are those with the reference, whose runs all of them share: their degrees of
    freedom are counted as if they did not.
    """
    for name in study.parts:
        own = [row for row in rows if row.part == name]
        run = pooled([list(row.nats.values()) for row in own])
        if run is None:
            continue
        of_point = {row.id: row for row in own}
        gaps = []
        for row in own:
            other = of_point.get(row.id.replace(f"/{row.variant}", f"/{study.reference}", 1))
            if other is not None and other.id != row.id:
                gaps.append([row.nats[s] - other.nats[s] for s in row.nats if s in other.nats])
        difference = pooled(gaps)
        return {"run": run} | ({} if difference is None else {"difference": difference})
    return {}


def power(
    study: StudyRecipe, noise: Mapping[str, Noise], rows: Sequence[Row]
) -> dict[str, Any] | None:
    """The smallest effect that n seeds resolve, and the seeds that the named effects need."""
    if not noise:
        return None
    kinds = {"unpaired": noise["run"]}
    if "difference" in noise:
        kinds["paired"] = noise["difference"]
    tokens = rows[0].tokens
    effects = []
    for name, nats in study.effects.items():
        one: dict[str, Any] = {"effect": name, "nats": nats}
        for kind, of in kinds.items():
            pair = kind == "paired"
            for key, sd in (("", of.sd), ("_at_least", of.low), ("_at_most", of.high)):
                one[f"seeds_{kind}{key}"] = seeds_needed(sd, nats, is_paired=pair)
        fewest = min(one[f"seeds_{kind}"] for kind in kinds)
        effects.append(one | {"runs": 2 * fewest, "tokens": 2 * fewest * tokens})
    return {
        "smallest_effect": {
            kind: {n: detectable(of.sd, n, is_paired=kind == "paired") for n in SEEDS}
            for kind, of in kinds.items()
        },
        "effects": effects,
    }
