"""`analyse`: runs in, a folder with every number, figures and a page out."""

import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from smelt.analyse import gradients, maps, probe
from smelt.analyse.ground import AnalysisSettings, Ground, read_ground
from smelt.analyse.runs import Run, open_runs
from smelt.analyse.summary import summarise
from smelt.checkpoint.device import check_device
from smelt.compress.pipeline import Stages, silent
from smelt.errors import CheckpointError
from smelt.outputs import check_new
from smelt.samoe.backbone import SaMoEModel

VERSION = 1
"""Of analysis.json."""


@dataclass(frozen=True)
class Analysis:
    """What was found, and where it was written."""

    folder: Path
    value: dict[str, Any]  # as in analysis.json
    figures: tuple[str, ...]  # names, in the order of the page
    missing: str | None  # what the figures need and this installation has not got


def analyse(
    folders: Sequence[str | Path],
    out: str | Path,
    settings: AnalysisSettings | None = None,
    *,
    stages: Stages = silent,
) -> Analysis:
    """Gradients, mixing, similarity and curves of runs side by side.

    Written to `out`: `analysis.json` with every number; with matplotlib installed
    `figures/NAME.svg` and the self-contained page `index.html`.

    Args:
        folders: of runs, of `seed-*` runs, or checkpoints on the way (`smelt/checkpoints/step-N`).
        out: must not exist.
        settings: the text and how much of it.

    Raises:
        CheckpointError: a folder that is no run, weights that cannot be used.
        CalibrationError: text that cannot be read, or too little of it.
        RecipeError: `out` exists; a device that is not there.
    """
    settings = settings or AnalysisSettings()
    place = check_new(out, "folder")
    device = check_device(settings.device)
    runs = open_runs(folders)
    found = []
    for number, run in enumerate(runs):
        name = f"{run.name} ({number + 1} of {len(runs)})"
        found.append(_analyse_run(run, settings, device, stages, name))
    value = plain(
        {
            "version": VERSION,
            "smelt": version("smelt"),
            "torch": version("torch"),
            "settings": settings.model_dump(mode="json"),
            "variants": summarise(runs, found),
            "runs": found,
        }
    )
    return _write(place, value)


def _analyse_run(
    run: Run, settings: AnalysisSettings, device: torch.device, stages: Stages, name: str
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "run": run.name,
        "variant": run.variant,
        "kind": run.kind,
        "seed": run.seed,
        "step": run.step,
        "ground": None,
        "gradients": None,
        "mixing": None,
        "similarity": None,
        "left_out": [],
    }
    if not run.log:
        found["left_out"].append("curves: the folder has no smelt/log.jsonl")
    reason = _unfit(run)
    if reason is not None:
        found["left_out"].append(f"everything but curves: {reason}")
        return found
    ground = read_ground(run, settings)
    model = run.model(device)
    _as_trained(model, run)
    found["ground"] = ground.facts()
    _run_model(found, model, ground, run, stages, name)
    return found


def _unfit(run: Run) -> str | None:
    """Why the model of a run cannot be looked into; None: it can."""
    if run.config is None:
        return "there are no weights yet: the run is not finished"
    if getattr(run.config, "is_encoder_decoder", False):
        return f"{run.config.model_type} is an encoder–decoder"
    return None


def _as_trained(model: PreTrainedModel, run: Run) -> None:
    """Give the model's own loss the weight of the balance that it was trained with."""
    if run.is_samoe and run.recipe.get("balance") == "mean":
        layers = len(model.config.layout.layers)
        model.config.router_aux_loss_coef /= max(layers, 1)


def _run_model(
    found: dict[str, Any],
    model: PreTrainedModel,
    ground: Ground,
    run: Run,
    stages: Stages,
    name: str,
) -> None:
    base = model.base_model
    if isinstance(base, SaMoEModel):
        found["mixing"] = maps.report(base, run) or None
    else:
        found["left_out"].append(f"α and β: {run.kind} is no SaMoE model")
    if isinstance(base, SaMoEModel) and not base.config.layout.layers:
        found["left_out"].append("experts, routing, α and β: the model is dense")
    try:
        flow = gradients.gradient_flow(
            model, ground.batches, progress=stages(f"gradients of {name}")
        )
        found["gradients"] = gradients.report(flow)
        alike = probe.similarity(model, ground.batches, progress=stages(f"layers of {name}"))
    except CheckpointError as error:
        if isinstance(base, SaMoEModel):
            raise
        found["left_out"].append(f"gradients and similarity: {error}")
        return
    found["left_out"] += alike.pop("left_out")
    found["similarity"] = alike


def plain(value: Any) -> Any:
    """The value as JSON holds it: Inf and NaN become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(place: Path, value: dict[str, Any]) -> Analysis:
    """The folder, whole or not at all."""
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        text = json.dumps(value, ensure_ascii=False)
        (partial / "analysis.json").write_text(text + "\n", encoding="utf-8")
        names, missing = _draw(partial, value)
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Analysis(place, value, names, missing)


def _draw(folder: Path, value: dict[str, Any]) -> tuple[tuple[str, ...], str | None]:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        missing = (
            "Figures need matplotlib, which is not installed: pip install 'smelt[report]'. Every "
            "number behind them is in analysis.json."
        )
        warnings.warn(missing, stacklevel=4)
        return (), missing
    from smelt.analyse import drawing, page

    drawn = drawing.draw(value)
    (folder / "figures").mkdir()
    for figure in drawn:
        (folder / "figures" / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
    (folder / "index.html").write_text(page.page(value, drawn), encoding="utf-8")
    return tuple(figure.name for figure in drawn), None
