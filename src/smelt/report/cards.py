"""Measured results in the model cards of output folders: as metadata, and as a table."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData

from smelt.checkpoint.card import BEGIN, END, card
from smelt.errors import CheckpointError, RecipeError
from smelt.evaluate.results import markdown
from smelt.outputs import write_text
from smelt.report.blocks import with_error
from smelt.report.material import read_material
from smelt.report.quality import Measure, measures, short
from smelt.report.runs import Run

_PART = re.compile(rf"{re.escape(BEGIN)}\n(.*?)\n?{re.escape(END)}", re.DOTALL)
_SEAL = re.compile(r"<!-- sha256 ([0-9a-f]{16}) -->\n?")


@dataclass(frozen=True)
class Filled:
    """A card that results were written into."""

    path: Path
    num_results: int
    existed: bool


def fill_cards(paths: Sequence[str | Path], result_files: Sequence[str | Path]) -> list[Filled]:
    """Write the results that belong to each run into its README.md.

    What a user wrote stays, word for word: only the part between smelt's marks is replaced, and
    the metadata gets the results. A part that was edited by hand is refused, before any card is
    written.

    Raises:
        RecipeError: nothing measured belongs to a run; a run without a folder.
        CheckpointError: a card that cannot be read, or whose measured part was edited.
    """
    material = read_material(paths, result_files=result_files)
    if not material.runs:
        raise RecipeError("--card: name the folders whose cards are meant, and --results.")
    found = measures(material.results)
    made = [_filled(run, found) for run in material.runs]
    for filled, text in made:
        write_text(filled.path, text)
    return [filled for filled, _ in made]


def _filled(run: Run, found: Sequence[Measure]) -> tuple[Filled, str]:
    if not run.path.is_dir():
        raise RecipeError(f"{run.path}: --card takes folders of checkpoints, and this is a plan.")
    own = [one for one in found if run.fingerprint in one.results]
    if not own:
        raise RecipeError(
            f"{run.path}: none of the results is of this checkpoint ({(run.fingerprint or '')[:12]}"
            "…). Measure it with `smelt evaluate`, and name the file with --results."
        )
    path = run.path / "README.md"
    existed = path.is_file()
    found_card = _read(path) if existed else _new(run)
    before = run.plan.checkpoint if run.plan is not None else None
    found_card.text = _with_part(path, found_card.text, _part(run, own, before))
    _add(found_card.data, run, own)
    return Filled(path, len(own), existed), str(found_card).rstrip() + "\n"


def _read(path: Path) -> ModelCard:
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: its metadata cannot be read ({reason[:200]}). Mend the part between the "
            "first two lines of ---."
        ) from None


def _new(run: Run) -> ModelCard:
    return ModelCard(card(f"# {run.name}", []))


def _part(run: Run, own: Sequence[Measure], before: str | None) -> str:
    """The measured part as Markdown, sealed so that an edit by hand is noticed."""
    rows = []
    for one in own:
        result = one.results[str(run.fingerprint)]
        row: dict[str, object] = {
            "measure": one.name + (" ↓" if one.is_lower_better else " ↑"),
            "items": ", ".join(short(text) for text in one.text),
            "n": one.n,
            "chance": one.chance,
        }
        original = one.results.get(before) if before is not None else None
        if original is not None:
            row["original"] = with_error(original.value, original.standard_error)
        rows.append(row | {"this": with_error(result.value, result.standard_error)})
    note = "± one standard error. Measured by `smelt evaluate`."
    text = f"{markdown(rows)}\n{note}"
    return f"<!-- sha256 {_seal(text)} -->\n{text}"


def _seal(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _with_part(path: Path, text: str, part: str) -> str:
    """The card's text with this part between the marks; at its end where there are none."""
    block = f"{BEGIN}\n{part}\n{END}"
    found = _PART.search(text)
    if found is None:
        return f"{text.rstrip()}\n\n## Measured\n\n{block}\n"
    sealed = _SEAL.match(found[1])
    if sealed is not None and _seal(found[1][sealed.end() :]) != sealed[1]:
        raise CheckpointError(
            f"{path}: what stands between “{BEGIN}” and “{END}” was edited by hand, and would be "
            "lost. Move your words out of it, or remove that part, and run the command again."
        )
    return text[: found.start()] + block + text[found.end() :]


def _add(data: CardData, run: Run, own: Sequence[Measure]) -> None:
    """The results in the metadata, in place of those of the same task, items and metric."""
    new = [one for measure in own if (one := _entry(measure, run)) is not None]
    assert isinstance(data, ModelCardData), "a model's card"
    old = list(data.eval_results or [])
    kept = [one for one in old if not any(one.is_equal_except_value(n) for n in new)]
    data.model_name = data.model_name or run.name
    data.eval_results = kept + new


def _entry(measure: Measure, run: Run) -> EvalResult | None:
    result = measure.results[str(run.fingerprint)]
    if not math.isfinite(result.value):
        return None
    texts = ", ".join(short(text) for text in measure.text) or measure.task
    return EvalResult(
        task_type="text-generation",
        dataset_type=measure.task,
        dataset_name=texts,
        metric_type=measure.metric,
        metric_value=result.value,
        metric_name=f"{measure.task} {measure.metric}",
        metric_args={"n": result.n, "standard_error": result.standard_error, "seed": result.seed},
    )
