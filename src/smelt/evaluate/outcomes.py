"""What a model made of every unit of a task, by one metric: scores are made of these."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from smelt.checkpoint.source import Checkpoint
from smelt.evaluate.aggregates import Columns, standard_error, value
from smelt.evaluate.results import Result, Setting, record


@dataclass(frozen=True)
class TaskScore:
    """One metric of a model on a task."""

    task: str  # its name; "blimp:syntax" is a part of one
    metric: str  # acc, acc_norm (by characters of the answer), perplexity (of the last word), …
    value: float
    standard_error: float | None  # over units; None: there is one
    n: int  # units
    chance: float | None  # of guessing evenly among an item's choices; None: there are none
    source: str  # which items, as a person names them
    sha256: str  # of the items
    num_cut: int = 0  # items whose beginning did not fit the model's positions
    unit: str = "items"
    harness: Mapping[str, Any] = field(default_factory=dict)
    """The settings that two scores must share to be compared: `Outcome.settings`."""

    def record(self, checkpoint: Checkpoint, *, seed: int = 0, device: str = "cpu") -> Result:
        """The score as a named record."""
        of = f" of {self.n:,}" if self.unit == "items" else " items"
        cut = f", {self.num_cut:,}{of} cut on the left" if self.num_cut else ""
        found = record(
            checkpoint,
            Setting((self.source + cut,), self.sha256, seed, device),
            task=self.task,
            metric=self.metric,
            value=self.value,
            n=self.n,
            standard_error=self.standard_error,
            chance=self.chance,
        )
        more = {"lm_eval": str(self.harness["lm_eval"])} if self.harness else {}
        return replace(
            found,
            versions={**found.versions, **more},
            unit=self.unit,
            harness=dict(self.harness) or None,
        )


@dataclass(frozen=True)
class Outcome:
    """A metric with what every unit adds to it."""

    task: str
    metric: str
    aggregate: str  # in `aggregates.AGGREGATES`; "": none of ours, and there are no columns
    columns: Columns
    names: tuple[str, ...]  # of the units: what two models are compared by, paired
    source: str
    sha256: str
    chance: float | None = None
    unit: str = "items"
    num_cut: int = 0
    harness: Mapping[str, Any] = field(default_factory=dict)
    """lm_eval (its version), shots, prompts (SHA-256 of all that the model is asked)."""
    told: float | None = None  # the value, where it is no aggregate of ours

    def score(self) -> TaskScore:
        """The metric with its standard error."""
        return TaskScore(
            task=self.task,
            metric=self.metric,
            value=value(self.aggregate, self.columns) if self.told is None else self.told,
            standard_error=(
                standard_error(self.aggregate, self.columns) if self.told is None else None
            ),
            n=len(self.columns),
            chance=self.chance,
            source=self.source,
            sha256=self.sha256,
            num_cut=self.num_cut,
            unit=self.unit,
            harness=self.harness,
        )
