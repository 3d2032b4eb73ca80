"""A page's sections, in order, and a line for each that has nothing to show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from smelt.report import draw_analysis, draw_costs, draw_plans, draw_ranks, draw_speed
from smelt.report.blocks import Block, Figure, Section, Table, Text, plural
from smelt.report.costs import COSTS, Costs, read_costs
from smelt.report.headline import headline, row_of
from smelt.report.material import Material
from smelt.report.names import Subject, subjects
from smelt.report.provenance import provenance
from smelt.report.quality import Measure, layer_records, measures, qualities
from smelt.report.quality_tables import tables
from smelt.report.studies import study
from smelt.report.told import done


@dataclass(frozen=True)
class Facts:
    """What was read, and what follows from it for every section."""

    material: Material
    measures: list[Measure]
    costs: Costs
    subjects: Mapping[str, Subject]


def read_facts(material: Material) -> Facts:
    """The facts of a page; refuses numbers that do not belong beside each other."""
    found = measures(material.results)
    return Facts(material, found, read_costs(material), subjects(material))


def sections(facts: Facts, command: str) -> list[Section]:
    """All that there is something to say in."""
    found: list[Section | None] = [
        _glance(facts),
        _told(facts),
        _used(facts),
        _merged(facts),
        _figure("errors", "Layer-wise output error", _errors(facts)),
        _ranks(facts),
        _quality(facts),
        _pareto(facts),
        _speed(facts),
        _sharing(facts),
        _figure("training", "Training", draw_analysis.curves(facts.material.runs)),
        _studies(facts),
    ]
    kept = [one for one in found if one is not None and (one.blocks or one.parts)]
    missing = not_measured(facts, {one.name for one in kept})
    return [*kept, *([missing] if missing else []), provenance(facts.material, command)]


def _glance(facts: Facts) -> Section | None:
    found = [headline(run, facts.measures, facts.costs) for run in facts.material.runs]
    known = [one for one in found if one is not None]
    if not known:
        return None
    blocks: list[Block] = list(known) if len(known) <= 3 else []
    if len(known) > 1:
        blocks.append(Table.of("The runs side by side", [row_of(one) for one in known]))
    return Section("glance", "At a glance", tuple(blocks))


def _told(facts: Facts) -> Section:
    return done(facts.material.runs)


def _used(facts: Facts) -> Section:
    figures = [draw_plans.usage(run) for run in facts.material.runs]
    return Section("usage", "Which experts are used", tuple(f for f in figures if f))


def _merged(facts: Facts) -> Section:
    runs = facts.material.runs
    figures = [*map(draw_plans.members, runs), draw_plans.similarity(runs)]
    return Section("merged", "Who merged with whom", tuple(f for f in figures if f))


def _figure(name: str, title: str, figure: Figure | None) -> Section | None:
    return None if figure is None else Section(name, title, (figure,))


def _errors(facts: Facts) -> Figure | None:
    found = layer_records(facts.material.results, "output error")
    names = {key: one.label for key, one in facts.subjects.items()}
    return draw_plans.errors(facts.material.runs, found, names)


def _ranks(facts: Facts) -> Section:
    figures = draw_ranks.ranks([one.value for one in facts.material.ranks])
    words = (
        "The stable rank of a matrix is ‖W‖² (Frobenius) over ‖W‖² (spectral): 1 where it has one "
        "direction, the shorter of its sides where all directions are equally strong."
    )
    return Section("ranks", "Stable rank", (Text(words), *figures) if figures else ())


def _quality(facts: Facts) -> Section:
    blocks: list[Block] = list(tables(facts.measures, facts.subjects))
    return Section("quality", "Quality", (*blocks, *_strangers(facts)) if blocks else ())


def _strangers(facts: Facts) -> list[Text]:
    """What the star behind a name means, where there is one."""
    if not any(one.role == "other" for one in facts.subjects.values()):
        return []
    return [Text("* Measured, and not among the runs of this page.", is_small=True)]


def _pareto(facts: Facts) -> Section:
    figures = [
        draw_costs.pareto(quality, key, facts.costs, facts.subjects)
        for quality in qualities(facts.measures, facts.material.answers)
        for key in COSTS
    ]
    kept: list[Block] = [figure for figure in figures if figure]
    if kept:
        words = (
            "Filled marks are on the front: no other checkpoint is as good at less cost, or better "
            "at no more. An open mark is beaten by another checkpoint."
        )
        kept = [Text(words), *kept, *_strangers(facts)]
    return Section("cost", "Quality against cost", tuple(kept))


def _speed(facts: Facts) -> Section:
    benches = facts.material.benches
    figures = [
        draw_speed.decode(benches, facts.subjects),
        draw_speed.roofline(benches, facts.subjects),
    ]
    blocks: list[Block] = [f for f in figures if f]
    if blocks:
        doubts = dict.fromkeys(reason for bench in benches for reason in bench.doubts)
        if doubts:
            words = f"The machine was not quiet: {'; '.join(doubts)}. Times are to be doubted."
            blocks.insert(0, Text(words))
        remarks = dict.fromkeys(remark for bench in benches for remark in bench.remarks)
        blocks += [Text(f"Warning: {remark}", is_small=True) for remark in remarks]
        blocks += [table for table in [draw_speed.weights(benches, facts.subjects)] if table]
    return Section("speed", "Speed on this machine", tuple(blocks))


def _sharing(facts: Facts) -> Section:
    parts = []
    for number, analysis in enumerate(facts.material.analyses):
        runs, variants = analysis.value["runs"], analysis.value["variants"]
        figures: list[Figure | None] = [f for run in runs for f in draw_analysis.alpha(run)]
        figures += [draw_analysis.beta(runs), *draw_analysis.gradients(variants)]
        figures += [draw_analysis.contributions(run) for run in runs]
        for variant in variants:
            words = "Linear CKA of the hidden states after each block"
            title = "Similarity of hidden states"
            figures.append(draw_analysis.alike(variant, "cka", title, words))
        blocks = tuple(f for f in figures if f)
        parts.append(Section(f"sharing-{number}", analysis.name, blocks))
    return Section("sharing", "Inside trained models: α, β and gradient flow", parts=tuple(parts))


def _studies(facts: Facts) -> Section:
    return Section("studies", "Studies", parts=tuple(map(study, facts.material.studies)))


# --- what is not there ---------------------------------------------------------------------------

_Lacks = Callable[[Facts], bool]


def _has_plans(facts: Facts) -> bool:
    return any(run.plan is not None for run in facts.material.runs)


def _has_samoe(facts: Facts) -> bool:
    return any("model_type: samoe" in run.recipe for run in facts.material.runs)


_COMMANDS: dict[str, tuple[str, str, _Lacks]] = {
    "usage": (
        "which experts are used",
        "smelt calibrate SOURCE -o stats, and name stats beside the plan",
        _has_plans,
    ),
    "errors": (
        "the output error of each layer",
        "smelt evaluate RUN --original SOURCE -o results.json",
        _has_plans,
    ),
    "ranks": (
        "stable rank",
        "smelt inspect RUN --stable-rank --beside SOURCE --json > ranks.json",
        _has_plans,
    ),
    "quality": (
        "quality",
        "smelt evaluate SOURCE RUN --original SOURCE -o results.json, and with --tasks",
        lambda facts: bool(facts.material.runs),
    ),
    "cost": (
        "quality against cost",
        "smelt evaluate and smelt bench of SOURCE and RUN, each with -o",
        lambda facts: bool(facts.material.runs),
    ),
    "speed": (
        "decode time and the roofline",
        "smelt bench SOURCE RUN -o bench.json",
        lambda facts: bool(facts.material.runs),
    ),
    "sharing": (
        "α, β and gradient flow",
        "smelt analyse RUN -o analysis",
        _has_samoe,
    ),
}
"""By section: what it would show, the command that measures it, and of what pages to say so."""


def not_measured(facts: Facts, shown: set[str]) -> Section | None:
    """The sections that are left out, and the commands that would fill them."""
    rows = [
        (what, command)
        for name, (what, command, is_due) in _COMMANDS.items()
        if name not in shown and is_due(facts)
    ]
    rows += [
        (f"{title[0]}", "smelt bench SOURCE RUN -o bench.json")
        for key, title in COSTS.items()
        if "cost" in shown and len(facts.costs.by_key[key]) < 2 and key != "bytes"
    ]
    if not rows:
        return None
    words = f"Not measured: {', '.join(what for what, _ in rows)}."
    table = Table("What would measure it", ("not measured", "command"), tuple(rows))
    return Section("missing", "Not measured", (Text(words), table))


def subtitle(facts: Facts) -> str:
    """What the page is about, in one line."""
    kinds: dict[str, int] = {}
    for run in facts.material.runs:
        kinds[run.kind] = kinds.get(run.kind, 0) + 1
    words = [
        plural(number, kind if kind == "plan" else f"{kind} checkpoint")
        for kind, number in kinds.items()
    ]
    other = {
        "set of statistics": len(facts.material.statistics),
        "analysis": len(facts.material.analyses),
        "study": len(facts.material.studies),
    }
    words += [_several(number, name) for name, number in other.items() if number]
    if facts.measures:
        words.append(f"{sum(len(one.results) for one in facts.measures):,} measured numbers")
    return ", ".join(words)


def _several(number: int, name: str) -> str:
    known = {"set of statistics": "sets of statistics", "analysis": "analyses", "study": "studies"}
    return f"1 {name}" if number == 1 else f"{number} {known[name]}"
