"""`report`: what was given in, one page out."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smelt.errors import RecipeError
from smelt.evaluate.results import markdown
from smelt.outputs import check_new, write_text
from smelt.report.blocks import join, slug
from smelt.report.draw_plans import plan_data
from smelt.report.material import Material, read_material
from smelt.report.page import plotly_bundle, render
from smelt.report.quality_tables import paper
from smelt.report.sections import read_facts, sections, subtitle


@dataclass(frozen=True)
class Page:
    """A page that was written."""

    path: Path
    num_bytes: int
    sections: tuple[str, ...]  # their titles
    missing: tuple[str, ...]  # what was not measured


def make_report(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    results: Sequence[str | Path] = (),
    bench: Sequence[str | Path] = (),
    title: str | None = None,
) -> Page:
    """Write one self-contained page of runs and measurements.

    Raises:
        SmeltError: something that cannot be read, or numbers that do not belong together; then
            nothing is written.
    """
    place = check_new(output)
    plotly_bundle()  # missing: found before anything is read
    material = read_material(paths, result_files=results, bench_files=bench)
    facts = read_facts(material)
    found = sections(facts, command_of(paths, place, results, bench, title))
    plans = {slug(run.name): plan_data(run) for run in material.runs if run.plan is not None}
    named = title or title_of(material)
    text = render(found, plans, title=named, subtitle=subtitle(facts))
    write_text(place, text)
    missing = [s for s in found if s.name == "missing"]
    lacks = [str(row[0]) for s in missing for b in s.blocks for row in getattr(b, "rows", ())]
    titles = tuple(s.title for s in found if s.name != "missing")
    return Page(place, len(text.encode("utf-8")), titles, tuple(lacks))


def make_markdown(
    paths: Sequence[str | Path],
    *,
    results: Sequence[str | Path] = (),
    bench: Sequence[str | Path] = (),
) -> str:
    """A Markdown table of costs and quality, a line per checkpoint."""
    facts = read_facts(read_material(paths, result_files=results, bench_files=bench))
    rows = paper(facts.measures, facts.costs, facts.subjects)
    if not rows:
        raise RecipeError(
            "There is nothing measured to put into a table. Name results (`smelt evaluate -o`) or "
            "a bench file (`smelt bench … -o`)."
        )
    return markdown(rows)


def title_of(material: Material) -> str:
    """A title by what is on the page."""
    names = [run.name for run in material.runs]
    names = names or [one.name for one in (*material.studies, *material.analyses)]
    names = names or [one.name for one in material.statistics]
    if not names:
        return "smelt report"
    if len(names) > 3:
        return f"{len(names)} runs of smelt"
    return join(names)


def command_of(
    paths: Sequence[str | Path],
    place: Path,
    results: Sequence[str | Path],
    bench: Sequence[str | Path],
    title: str | None,
) -> str:
    """The command that makes the page again."""
    words = ["smelt", "report", *map(str, paths)]
    for option, values in (("--results", results), ("--bench", bench)):
        for value in values:
            words += [option, str(value)]
    words += ["--title", title] if title else []
    return shlex.join([*words, "-o", str(place)])
