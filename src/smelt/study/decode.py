"""Decode steps of a study's models, all measured in turns in one process."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from smelt.bench.decode import DecodeSettings, measure
from smelt.bench.subjects import load
from smelt.study.rows import gather
from smelt.study.settings import StudyRecipe
from smelt.study.store import Store, evaluation_of, read, write


def measure_decode(
    study: StudyRecipe,
    only: str | None = None,
    *,
    turns: int = 5,
    threads: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Milliseconds per cached step of every causal row that has a finished seed.

    Seeds differ in nothing that takes time, so the first one stands for its row. The context is the
    middle of a training sequence. The batches are those of the evaluation of each row's part; a
    row measured before in another call keeps those figures until it is measured again. A row known
    by records alone has nothing to measure.

    Returns:
        what is written to OUTPUT/decode.json: `milliseconds` of the fastest turn by cell and batch,
        and every record.
    """
    store = Store(study.output)
    rows = [row for row in gather(study, only) if row.recipe.objective == "causal"]
    groups: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for row in rows:
        batches = evaluation_of(study, row.part).decode_batches
        cell = row.runs[min(row.runs)].cell
        group = groups.setdefault((batches, row.recipe.sequence_length // 2), [])
        if cell not in group and not row.is_twin and store.has_weights(cell):
            group.append(cell)
    path = store.folder / "decode.json"
    found: dict[str, Any] = {"milliseconds": {}, "steps": []} | (read(path) or {})
    for (batches, context), cells in groups.items():
        settings = DecodeSettings(
            batches=batches, contexts=(context,), turns=turns, threads=threads
        )
        subjects = [
            replace(
                load(str(store.run(cell)), dtype=settings.dtype, device=settings.device), name=cell
            )
            for cell in cells
        ]
        decoded = measure(subjects, settings, progress)
        found["steps"] = [one for one in found["steps"] if one["checkpoint"] not in cells]
        for step in decoded.steps:
            found["steps"].append(asdict(step))
            found["milliseconds"].setdefault(step.checkpoint, {})[str(step.batch)] = step.ms
    write(path, found)
    return found
