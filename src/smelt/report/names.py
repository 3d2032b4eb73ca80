"""What checkpoints are called on the page, by their fingerprints, and whose they are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from smelt.errors import RecipeError
from smelt.report.material import Material

Role = Literal["run", "original", "other"]


@dataclass(frozen=True)
class Subject:
    """A checkpoint that numbers are told of."""

    fingerprint: str
    name: str
    role: Role

    @property
    def label(self) -> str:
        """The name, and what it is where it is no run of this page."""
        if self.role == "original" and self.name != "original":
            return f"{self.name} (original)"
        return self.name + (" *" if self.role == "other" else "")


Subjects = Mapping[str, Subject]
"""By fingerprint."""


def subjects(material: Material) -> dict[str, Subject]:
    """By fingerprint: the runs, their originals, then others that were measured.

    Raises:
        RecipeError: a file of measurements has nothing to do with any of the runs.
    """
    runs = {r.fingerprint: r.name for r in material.runs if r.fingerprint is not None}
    originals = {r.plan.checkpoint for r in material.runs if r.plan is not None}
    originals |= {str(r.provenance["source_fingerprint"]) for r in material.runs if _is_made(r)}
    known = runs.keys() | originals
    measured = dict(_measured(material))
    found = {}
    for fingerprint in [*originals, *runs, *measured]:
        if fingerprint in runs:
            found[fingerprint] = Subject(fingerprint, runs[fingerprint], "run")
        elif fingerprint in originals:
            named = measured.get(fingerprint) or _source(material, fingerprint)
            found[fingerprint] = Subject(fingerprint, named, "original")
        else:
            role: Role = "other" if known else "run"
            found[fingerprint] = Subject(fingerprint, measured[fingerprint], role)
    if known and measured and not known & measured.keys():
        first = next(iter(measured.values()))
        raise RecipeError(
            f"None of the measurements is of the runs named or their originals: they are of "
            f"{first} ({next(iter(measured))[:12]}…). Name the run they belong to, or leave the "
            "runs out to report the measurements alone."
        )
    return _distinct(found)


def _is_made(run: object) -> bool:
    return bool(getattr(run, "provenance", {}).get("source_fingerprint"))


def _measured(material: Material) -> Iterable[tuple[str, str]]:
    """Fingerprint and name of all that was measured; the first name counts."""
    seen = set()
    pairs = [(r.fingerprint, r.checkpoint) for r in material.results]
    for bench in material.benches:
        pairs += [(one.fingerprint, one.checkpoint) for one in bench.checkpoints]
        pairs += [(one.fingerprint, one.checkpoint) for one in bench.decode]
    for fingerprint, name in pairs:
        if fingerprint not in seen:
            seen.add(fingerprint)
            yield fingerprint, name


def _source(material: Material, fingerprint: str) -> str:
    for run in material.runs:
        if run.provenance.get("source_fingerprint") == fingerprint:
            return run.source
    return "original"


def _distinct(found: dict[str, Subject]) -> dict[str, Subject]:
    """Two checkpoints of one name get the beginnings of their fingerprints."""
    labels = [one.label for one in found.values()]
    return {
        key: one
        if labels.count(one.label) == 1
        else Subject(key, f"{one.name} {key[:8]}", one.role)
        for key, one in found.items()
    }
