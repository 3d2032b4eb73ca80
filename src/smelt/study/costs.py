"""Loss against size, and rows beside other variants at equal cost."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from smelt.study.matched import Point, match
from smelt.study.rows import Row
from smelt.study.settings import StudyRecipe
from smelt.study.statistics import Noise, fit_log_plane, fit_power_law


def fits(study: StudyRecipe, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per fitted part, variant and text: loss against parameters, and against D and E at once."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if study.parts[row.part].is_fitted and row.config is not None:
            key = (row.part, row.variant, *row.is_comparable_with)
            groups.setdefault(key, []).append(row)
    found = []
    for (part, variant, *_), own in groups.items():
        sizes = [(row.config.hidden_size, row.config.num_experts) for row in own if row.config]
        nats = [row.loss.mean for row in own]
        law = fit_power_law([row.parameters for row in own], nats)
        plane = fit_log_plane(sizes, nats)
        found.append(
            {
                "part": part,
                "variant": variant,
                "text": list(own[0].runs[min(own[0].runs)].by_source),
                "rows": [row.id for row in own],
                "nats": nats,
                "by_parameters": None
                if law is None
                else asdict(law) | {"is_determined": law.is_determined},
                "by_width_and_experts": None if plane is None else asdict(plane),
            }
        )
    return found


COSTS: dict[str, Callable[[Row], float | None]] = {
    "total parameters": lambda row: row.parameters,
    "FLOPs per token": lambda row: row.flops_per_token,
}


def matched(
    study: StudyRecipe, rows: Sequence[Row], noise: Noise | None
) -> dict[str, list[dict[str, Any]]]:
    """Rows beside every other variant at equal cost: parameters, FLOPs, decode time by batch.

    Only rows of the same text, objective and training tokens are compared. Errors are those of the
    pooled seed noise.
    """
    own = [row for row in rows if not row.is_twin]
    costs = dict(COSTS)
    for batch in sorted({batch for row in own for batch in row.decode}):
        costs[f"decode time, batch {batch}"] = lambda row, batch=batch: row.decode.get(batch)  # type: ignore[misc]
    return {name: list(_matches(study, own, cost, noise)) for name, cost in costs.items()}


def _matches(
    study: StudyRecipe,
    rows: Sequence[Row],
    cost: Callable[[Row], float | None],
    noise: Noise | None,
) -> Iterable[dict[str, Any]]:
    def points(wanted: Iterable[Row]) -> list[Point]:
        found = []
        for row in wanted:
            value = cost(row)
            if value is not None:
                error = noise.sd / row.loss.n**0.5 if noise is not None else None
                found.append(Point(row.id, value, row.loss.mean, error))
        return found

    compared = [row for row in rows if study.focus in (None, row.variant)]
    for row in compared:
        if study.focus is None and row.variant == study.reference:
            continue
        for point in points([row]):
            for variant in dict.fromkeys(one.variant for one in rows):
                if variant == row.variant or (not study.focus and variant != study.reference):
                    continue
                same = points(
                    one
                    for one in rows
                    if one.variant == variant and one.is_comparable_with == row.is_comparable_with
                )
                if same:
                    yield _matched(point, variant, same)


def _matched(point: Point, variant: str, same: Sequence[Point]) -> dict[str, Any]:
    found = match(point, same)
    if found is None:
        nearest = min(same, key=lambda one: abs(math.log(one.cost / point.cost)))
        return {
            "row": point.id,
            "cost": point.cost,
            "nats": point.nats,
            "beside": variant,
            "taken_from": [nearest.id],
            "how": f"not spanned: the nearest costs {nearest.cost / point.cost:.2f} of it",
            "nats_beside": None,
            "difference": None,
            "standard_error": None,
        }
    return {
        "row": found.point.id,
        "cost": found.point.cost,
        "nats": found.point.nats,
        "beside": variant,
        "taken_from": list(found.others),
        "how": found.how,
        "nats_beside": found.nats,
        "difference": found.difference,
        "standard_error": found.error,
    }
