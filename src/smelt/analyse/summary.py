"""What the runs of one variant say together: mean ± standard deviation over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from smelt.analyse.curves import curves, tokens_per_step
from smelt.analyse.runs import Run

Found = Mapping[str, Any]
"""What was found of one run."""


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, sd of a sample (null of one) and n of the values that are numbers; None: no value."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    sd = stdev(known) if len(known) > 1 else None
    return {"mean": fmean(known), "sd": sd, "n": len(known)}


def summarise(runs: Sequence[Run], found: Sequence[Found]) -> list[dict[str, Any]]:
    """One entry per variant, in the order of their first runs."""
    variants = dict.fromkeys(run.variant for run in runs)
    summaries = []
    for label in variants:
        own = [run for run in runs if run.variant == label]
        results = [one for run, one in zip(runs, found, strict=True) if run.variant == label]
        experts = getattr(own[0].config, "num_experts", None)
        words = [word for word in label.split(" · ") if not word.startswith("E=")]
        summaries.append(
            {
                "variant": label,
                "without_experts": " · ".join(words),  # the same but for E: a line over E
                "num_experts": experts,
                "runs": [run.name for run in own],
                "tokens_per_step": tokens_per_step(own[0]),
                "curves": curves(own),
                "gradients": _gradients([one["gradients"] for one in results]),
                "mixing": _mixing([one["mixing"] for one in results]),
                "similarity": _similarity([one["similarity"] for one in results]),
            }
        )
    return summaries


def _gradients(found: Sequence[Found | None]) -> dict[str, Any] | None:
    known = [one for one in found if one]
    if not known:
        return None
    return {
        "loss": spread([one["loss"]["mean"] for one in known]),
        "parts": _parts([one["parts"] for one in known]),
        "experts_by_layer": _parts([_layers(one) for one in known]),
        "per_stored_expert": _mean_of_experts(known, "experts_stored"),
        "per_expert_and_layer": _mean_of_experts(known, "experts_by_layer"),
        "alignment": spread([c["alignment"] for one in known for c in one["contributions"]]),
    }


def _layers(one: Found) -> list[dict[str, Any]]:
    parts = (one["experts_by_layer"] or {}).get("parts", [])
    return [{**part, **part["whole"]} for part in parts]


def _parts(found: Sequence[Sequence[Found]]) -> list[dict[str, Any]]:
    """The same part of every run beside each other; the runs of a variant have the same parts."""
    summaries = []
    for same in zip(*found, strict=True):
        place = {name: same[0][name] for name in ("kind", "block", "layers")}
        figures = {name: spread([part[name] for part in same]) for name in ("norm", "snr")}
        summaries.append({**place, **figures})
    return summaries


def _mean_of_experts(found: Sequence[Found], name: str) -> dict[str, Any] | None:
    means = [one[name]["mean"] for one in found if one[name]]
    if not means:
        return None
    return {key: spread([one[key] for one in means]) for key in ("norm", "snr", "tokens")}


def _mixing(found: Sequence[Found | None]) -> dict[str, Any] | None:
    alphas = [one["alpha"] for one in found if one and "alpha" in one]
    betas = [one["beta"]["values"] for one in found if one and "beta" in one]
    if not alphas and not betas:
        return None
    return {
        "blocks": next(one["blocks"] for one in found if one),
        "effective_rank": spread([fmean(one["effective_rank"]) for one in alphas]),
        "highest_rank": alphas[0]["highest_rank"] if alphas else None,
        "farthest_from_one_hot": alphas[0]["farthest_from_one_hot"] if alphas else None,
        "distance_from_one_hot": _by_layer(alphas, lambda one: one["distance_from_one_hot"]),
        "largest_share": _by_layer(alphas, lambda one: one["largest_share"]),
        "beta": [spread(column) for column in zip(*betas, strict=True)] or None,
    }


def _by_layer(
    found: Sequence[Found], read: Callable[[Found], Sequence[Sequence[float]]]
) -> list[dict[str, Any] | None] | None:
    """Per layer the mean over columns, then over runs."""
    rows = [[_finite_mean(columns) for columns in read(one)] for one in found]
    return [spread(column) for column in zip(*rows, strict=True)] or None


def _finite_mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else None


MATRICES = (
    "cka",
    "output_cosine",
    "weight_cosine",
    "mutual_information",
    "same_expert",
    "same_expert_by_chance",
)


def _similarity(found: Sequence[Found | None]) -> dict[str, Any] | None:
    known = [one for one in found if one]
    summary: dict[str, Any] = {}
    for name in MATRICES:
        stack = [np.array(one[name], dtype=float) for one in known if name in one]
        if stack:
            summary[name] = {
                "mean": np.mean(stack, axis=0).tolist(),
                "sd": np.std(stack, axis=0, ddof=1).tolist() if len(stack) > 1 else None,
                "n": len(stack),
            }
    return summary or None
