"""Checkpoints against the first of them on the same items: differences with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smelt.errors import SmeltError
from smelt.evaluate.bootstrap import RESAMPLES, Difference, paired_differences
from smelt.evaluate.item_files import Answers
from smelt.evaluate.outcomes import Outcome
from smelt.evaluate.results import differing


@dataclass(frozen=True)
class Paired:
    """A metric of a checkpoint less that of the first."""

    task: str
    metric: str
    checkpoint: str
    against: str
    difference: Difference
    unit: str

    def row(self) -> dict[str, Any]:
        """The difference as a row of a table."""
        one = self.difference
        return {
            "task": self.task,
            "metric": self.metric,
            "checkpoint": self.checkpoint,
            "less": self.against,
            "difference": one.mean,
            "95 % low": one.low,
            "95 % high": one.high,
            "p": one.p,
            "n": one.n,
            "of": self.unit,
        }


def compare_answers(
    answers: Sequence[Answers], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Paired]:
    """Every checkpoint less the first, by task and metric, on the same items.

    Raises:
        SmeltError: one checkpoint alone; the tasks, metrics, items, prompts, examples or version
            of the harness differ (it says which).
    """
    if len(answers) < 2:
        raise SmeltError(
            f"{len(answers)} checkpoint has nothing to be compared with: a comparison is of two or "
            "more, and the others are held against the first."
        )
    first = answers[0]
    for other in answers[1:]:
        _check(first, other)
    found = []
    for other in answers[1:]:
        pairs = list(zip(other.outcomes, first.outcomes, strict=True))
        pairs = [(ours, theirs) for ours, theirs in pairs if ours.aggregate]
        for group in _of_the_same_units(pairs):
            differences = paired_differences(
                [ours.aggregate for ours, _ in group],
                [ours.columns for ours, _ in group],
                [theirs.columns for _, theirs in group],
                seed=seed,
                resamples=resamples,
            )
            found += [
                Paired(ours.task, ours.metric, other.name, first.name, difference, ours.unit)
                for (ours, _), difference in zip(group, differences, strict=True)
            ]
    return found


def _of_the_same_units(
    pairs: Sequence[tuple[Outcome, Outcome]],
) -> list[list[tuple[Outcome, Outcome]]]:
    """Metrics that are resampled together: those of one task and one kind of unit."""
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[Outcome, Outcome]]] = {}
    for ours, theirs in pairs:
        groups.setdefault((ours.task, ours.names), []).append((ours, theirs))
    return list(groups.values())


def _check(first: Answers, other: Answers) -> None:
    who = f"{first.name} and {other.name} do not compare"
    kinds = [[(o.task, o.metric) for o in one.outcomes] for one in (first, other)]
    if kinds[0] != kinds[1]:
        lacking = [
            pair for pair in dict.fromkeys(kinds[0] + kinds[1]) if not all(pair in k for k in kinds)
        ]
        named = ", ".join(" ".join(pair) for pair in lacking[:6]) or "their order"
        raise SmeltError(
            f"{who}: their tasks and metrics differ ({named}). Ask both the same tasks."
        )
    for ours, theirs in zip(first.outcomes, other.outcomes, strict=True):
        found = differing(
            {"items": ours.sha256, **ours.harness}, {"items": theirs.sha256, **theirs.harness}
        )
        if found:
            raise SmeltError(
                f"{who} on {ours.task}: {found}. Measure both with the same settings, on the same "
                "items."
            )
        if ours.names != theirs.names:
            raise SmeltError(f"{who} on {ours.task}: their units have other names.")
