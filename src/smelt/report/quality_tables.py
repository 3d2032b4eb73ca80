"""Tables of quality: for the page, and as Markdown for a paper."""

from collections.abc import Sequence

from smelt.report.blocks import Table, with_error
from smelt.report.costs import COSTS, Costs
from smelt.report.draw_costs import cost_words
from smelt.report.names import Subjects
from smelt.report.quality import Measure, short


def tables(found: Sequence[Measure], subjects: Subjects) -> list[Table]:
    """One table for text, one for tasks: a row per measure, a column per checkpoint."""
    groups = {
        "On text: loss, and how near to the original": [one for one in found if _is_text(one)],
        "Tasks": [one for one in found if not _is_text(one)],
    }
    return [
        Table.of(caption, _rows(held, subjects), _note(held))
        for caption, held in groups.items()
        if held
    ]


def _is_text(one: Measure) -> bool:
    return one.task in ("perplexity", "fidelity")


def _rows(found: Sequence[Measure], subjects: Subjects) -> list[dict[str, object]]:
    order = [f for f in subjects if any(f in one.results for one in found)]
    sources = {one.text for one in found}
    rows = []
    for one in found:
        row: dict[str, object] = {"measure": one.name + (" ↓" if one.is_lower_better else " ↑")}
        if _is_text(one) and len(sources) > 1:
            row["text"] = ", ".join(short(text) for text in one.text)
        row["n"] = one.n
        row["chance"] = one.chance
        for fingerprint in order:
            result = one.results.get(fingerprint)
            row[subjects[fingerprint].label] = (
                None if result is None else with_error(result.value, result.standard_error)
            )
        rows.append(row)
    return rows


def _note(found: Sequence[Measure]) -> str:
    """What every reader of the table has to know."""
    versions = sorted(
        {
            f"{name} {version}"
            for one in found
            for result in one.results.values()
            for name, version in result.versions.items()
            if name in ("smelt", "lm_eval", "transformers")
        }
    )
    seeds = sorted({result.seed for one in found for result in one.results.values()})
    texts = sorted({short(text) for one in found for text in one.text})
    words = [
        "± one standard error; ↑ more is better, ↓ less is better.",
        f"Seed {', '.join(map(str, seeds))}; {', '.join(versions)}.",
    ]
    words.insert(1, f"{'Text' if _is_text(found[0]) else 'Items'}: {', '.join(texts)}.")
    return " ".join(words)


def paper(found: Sequence[Measure], costs: Costs, subjects: Subjects) -> list[dict[str, object]]:
    """Rows for a paper: a line per checkpoint, its costs, then what was measured."""
    shown = [f for f in subjects if _is_known(f, found, costs)]
    rows = []
    for fingerprint in shown:
        row: dict[str, object] = {"checkpoint": subjects[fingerprint].label}
        for key, (name, _) in COSTS.items():
            value = costs.by_key[key].get(fingerprint)
            at = costs.decode_at if key == "decode" else None
            label = name if at is None else f"{name}, batch {at[0]}"
            row[label] = None if value is None else cost_words(key, value)
        for one in found:
            result = one.results.get(fingerprint)
            arrow = "↓" if one.is_lower_better else "↑"
            cell = None if result is None else with_error(result.value, result.standard_error)
            row[f"{_column(one, found)} {arrow}"] = cell
        rows.append(row)
    return rows


def _column(one: Measure, found: Sequence[Measure]) -> str:
    """The measure, with its items where another row has the same name."""
    same = [other for other in found if other.name == one.name]
    return one.name if len(same) == 1 else f"{one.name}, {short(one.text[0])}, n = {one.n:,}"


def _is_known(fingerprint: str, found: Sequence[Measure], costs: Costs) -> bool:
    is_measured = any(fingerprint in one.results for one in found)
    return is_measured or any(fingerprint in held for held in costs.by_key.values())
