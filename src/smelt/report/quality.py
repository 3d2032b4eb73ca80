"""Records of quality side by side: one row per measure, one column per checkpoint."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from smelt.errors import RecipeError
from smelt.evaluate.item_files import Answers
from smelt.evaluate.outcomes import Outcome
from smelt.evaluate.results import Result

LOWER_IS_BETTER = ("nats", "perplexity", "bits", "KL", "error", "loss", "rate", "repetition")
_LAYERS = ("output error of ", "routing agreement of ")
_SETTINGS = ("text_sha256", "harness")
"""Fields in which the records of one row have to agree, where a record has them."""


@dataclass(frozen=True)
class Measure:
    """One thing that was measured, the same way, of some checkpoints."""

    task: str
    metric: str
    text: tuple[str, ...]
    setting: tuple[str, ...]
    results: Mapping[str, Result] = field(default_factory=dict)  # by fingerprint

    @property
    def is_lower_better(self) -> bool:
        return any(word in self.metric for word in LOWER_IS_BETTER)

    @property
    def name(self) -> str:
        """Task and metric as a table has them."""
        same = self.task in ("perplexity", "fidelity")
        return self.metric if same else f"{self.task}, {self.metric}"

    @property
    def chance(self) -> float | None:
        return next(iter(self.results.values())).chance

    @property
    def n(self) -> int:
        return next(iter(self.results.values())).n


def measures(results: Sequence[Result]) -> list[Measure]:
    """The records as rows, in the order of the files; of one measured twice the latest counts.

    Records of single layers are left out (`layer_records`).

    Raises:
        RecipeError: checkpoints measured in different settings, which do not compare.
    """
    rows: dict[tuple[object, ...], dict[str, Result]] = {}
    for result in sorted(results, key=lambda one: one.time):
        if not result.metric.startswith(_LAYERS):
            key = (result.task, result.metric, result.text, _setting(result))
            rows.setdefault(key, {})[result.fingerprint] = result
    order = {(r.task, r.metric): i for i, r in reversed(list(enumerate(results)))}
    found = [
        Measure(str(key[0]), str(key[1]), next(iter(held.values())).text, _texts(key[3]), held)
        for key, held in rows.items()
    ]
    found.sort(key=lambda one: order[one.task, one.metric])
    _check(found)
    return found


def _setting(result: Result) -> tuple[str, ...]:
    return tuple(str(getattr(result, name, None)) for name in _SETTINGS)


def _texts(value: object) -> tuple[str, ...]:
    assert isinstance(value, tuple)
    return value


def _check(found: Sequence[Measure]) -> None:
    """Refuse a table whose readers would compare what was measured in different settings."""
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            if (one.task, one.metric) != (other.task, other.metric):
                continue
            only, others = one.results.keys() - other.results, other.results.keys() - one.results
            if not only or not others:
                continue
            if "bits per byte" in one.metric and one.text == other.text:
                continue  # made for checkpoints whose tokenizers cut a text differently
            first, second = one.results[min(only)], other.results[min(others)]
            raise RecipeError(
                f"{one.task}, {one.metric}: {first.checkpoint} and {second.checkpoint} were "
                f"measured differently ({_difference(first, second)}), so one table cannot hold "
                "them. Measure them in one `smelt evaluate`, or make a report of each."
            )


def _difference(first: Result, second: Result) -> str:
    """In what two records differ."""
    if first.text_sha256 != second.text_sha256:
        texts = f"{_words(first)} against {_words(second)}"
        mine, theirs = first.text_sha256[:8], second.text_sha256[:8]
        return f"items or texts: {texts}, hashes {mine}… and {theirs}…"
    old, new = (one.harness or {} for one in (first, second))
    differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    words = [f"{key} {old.get(key)!s:.24} against {new.get(key)!s:.24}" for key in differ]
    if words:
        return f"harness settings: {', '.join(words)}"
    return f"texts: {_words(first)} against {_words(second)}"


def _words(result: Result) -> str:
    return f"{', '.join(short(one) for one in result.text) or result.task}, n = {result.n:,}"


def short(source: str) -> str:
    """A text source with the last two parts of its path only."""
    return "/".join(source.split("/")[-2:])


def layer_records(results: Sequence[Result], what: str) -> dict[str, dict[str, float]]:
    """By fingerprint and layer: "output error" or "routing agreement" of single layers."""
    found: dict[str, dict[str, float]] = {}
    for result in sorted(results, key=lambda one: one.time):
        head, of, layer = result.metric.partition(" of ")
        if of and head == what:
            found.setdefault(result.fingerprint, {})[layer] = result.value
    return found


Parts = tuple[tuple[float, ...], ...]
"""By sample (a text, or each of some tasks): what each of its units adds to a value."""


@dataclass(frozen=True)
class Quality:
    """One number that says how good each checkpoint is, for the figures against cost."""

    name: str
    is_lower_better: bool
    values: Mapping[str, tuple[float, float | None]]  # by fingerprint: value, standard error
    note: str = ""
    parts: Mapping[str, Parts] = field(default_factory=dict)
    """By fingerprint, where they are known: of two checkpoints they are pairs."""


def qualities(found: Sequence[Measure], answers: Sequence[Answers] = ()) -> list[Quality]:
    """What figures against cost are drawn of: a loss, and the mean accuracy over the tasks.

    Args:
        answers: what became of every item of tasks, of some of the checkpoints.
    """
    chosen = []
    for metric in ("bits per byte", "nats per token"):
        losses = [one for one in found if one.metric == metric and one.task == "perplexity"]
        for one in losses[:1]:
            values = {f: (r.value, r.standard_error) for f, r in one.results.items()}
            texts = ", ".join(short(text) for text in one.text)
            parts = {f: (r.by_sequence,) for f, r in one.results.items() if r.by_sequence}
            chosen.append(Quality(metric, True, _finite(values), f"on {texts}", parts))
        if chosen:
            break
    tasks = [one for one in found if one.metric == "acc" and ":" not in one.task]
    if tasks:
        shared = set.intersection(*(set(one.results) for one in tasks))
        values = {f: _mean([one.results[f] for one in tasks]) for f in shared}
        names = ", ".join(one.task for one in tasks)
        plural = "mean accuracy" if len(tasks) > 1 else "accuracy"
        told = {f: _by_item([one.results[f] for one in tasks], answers) for f in shared}
        known = {f: own for f, own in told.items() if own}
        chosen.append(Quality(plural, False, _finite(values), f"over {names}", known))
    return [one for one in chosen if one.values]


def _by_item(results: Sequence[Result], answers: Sequence[Answers]) -> Parts:
    """What each item of every task adds to a checkpoint's mean over tasks; (): not known of all."""
    found = []
    for result in results:
        outcome = _outcome_of(result, answers)
        if outcome is None:
            return ()
        column = outcome.columns[:, 0]
        found.append(tuple((column / (len(column) * len(results))).tolist()))
    return tuple(found)


def _outcome_of(result: Result, answers: Sequence[Answers]) -> Outcome | None:
    """What the mean of a result was taken of, asked the same way and with the same value."""

    def is_it(one: Outcome) -> bool:
        asked = (one.task, one.metric, one.sha256, dict(one.harness) or None)
        return (
            asked == (result.task, result.metric, result.text_sha256, result.harness)
            and one.aggregate == "mean"
            and len(one.columns) > 0
            and math.isclose(one.columns[:, 0].mean(), result.value, abs_tol=1e-6)
        )

    own = [answer.outcomes for answer in answers if answer.fingerprint == result.fingerprint]
    return next((one for outcomes in own for one in outcomes if is_it(one)), None)


def _mean(results: Sequence[Result]) -> tuple[float, float | None]:
    """Mean over tasks and its standard error, tasks taken as independent."""
    errors = [result.standard_error for result in results]
    known = [error for error in errors if error is not None]
    error = math.sqrt(math.fsum(e * e for e in known)) / len(errors)
    return fmean(r.value for r in results), error if len(known) == len(errors) else None


def _finite(
    values: Mapping[str, tuple[float, float | None]],
) -> dict[str, tuple[float, float | None]]:
    return {name: one for name, one in values.items() if math.isfinite(one[0])}
