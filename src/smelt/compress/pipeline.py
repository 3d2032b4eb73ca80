"""From a recipe to a compressed checkpoint: open, calibrate, plan, apply. Commands call this."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from smelt import processes
from smelt.checkpoint.factored import is_factored
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.sink import check_destination
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.verify import verify as verify_files
from smelt.checkpoint.width import hidden_field
from smelt.compress.apply import apply
from smelt.compress.calibrate import Progress, RoutingStats, calibrate
from smelt.compress.card import documents
from smelt.compress.check import check, needs_gradients
from smelt.compress.decide import make_plan
from smelt.compress.facts import Facts, bank_reader, read_facts, router_reader
from smelt.compress.gradients import check_gradients_fit, with_gradients
from smelt.compress.inputs import read_inputs
from smelt.compress.measured import (
    Measurer,
    bounds,
    measured_counts,
    measured_shape,
    shapes,
)
from smelt.compress.methods import resolve
from smelt.compress.plan import Plan
from smelt.compress.reconstructor import check_runs_alone
from smelt.compress.walking import apply_walking
from smelt.errors import PlanError
from smelt.recipe import CalibrationRecipe, CompressRecipe

Stages = Callable[[str], Progress]
"""Given the name of a stage of work, where to report its progress."""

_USEFUL = 16
"""Tokens that an expert should see before its statistics say something."""


def silent(stage: str) -> Progress:  # noqa: ARG001 - it has the arguments of its kind
    """Stages that nobody watches."""
    return lambda block, done, total: None


@dataclass(frozen=True)
class Calibrated:
    """Statistics and the inputs they were taken from (which sequential compression walks again)."""

    stats: RoutingStats
    batches: list[Batch]


def run_calibration(
    checkpoint: Checkpoint,
    recipe: CalibrationRecipe,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Calibrated:
    """The routing statistics of a checkpoint on the text or task of a recipe, in one pass.

    With `gradients`, a second pass through the whole model in memory.
    """
    batches, sha256 = read_inputs(checkpoint, recipe)
    if recipe.gradients:
        check_gradients_fit(checkpoint, batches, device)
    stats = calibrate(
        checkpoint,
        batches,
        text=sha256,
        device=device,
        sample_tokens=recipe.sample_tokens,
        seed=recipe.seed,
        input_gram=recipe.input_gram,
        details=recipe.model_dump(mode="json"),
        progress=progress,
    )
    if recipe.gradients:
        stats = with_gradients(stats, checkpoint, batches, device=device, progress=progress)
    _warn_if_few(stats)
    return Calibrated(stats, batches)


def _warn_if_few(stats: RoutingStats) -> None:
    """Warn of statistics of which many experts have next to nothing to say."""
    counts = [int(n) for layer in stats.layers.values() for n in layer.count]
    unseen = sum(n < _USEFUL for n in counts)
    if unseen > len(counts) / 10:
        warnings.warn(
            f"{stats.num_tokens:,} calibration tokens reach {unseen:,} of {len(counts):,} experts "
            f"fewer than {_USEFUL} times each: their scores are noise. Calibrate on more tokens.",
            stacklevel=3,
        )


def is_decomposed(checkpoint: Checkpoint, facts: Facts) -> bool:
    """Whether some layer's experts are stored as factors."""
    modules = (checkpoint.model.get_submodule(layer.experts) for layer in facts.anatomy.layers)
    return any(map(is_factored, modules))


def check_possible(checkpoint: Checkpoint, facts: Facts, recipe: CompressRecipe) -> None:
    """Refuse a compression that cannot exist, before any weight is read.

    Raises:
        PlanError: settings that do not fit each other or the checkpoint.
        CheckpointError: a family that cannot hold the result.
    """
    if is_decomposed(checkpoint, facts):
        raise PlanError(
            f"{checkpoint.folder}: its experts are decomposed already. Compress the checkpoint it "
            "was made from."
        )
    if getattr(checkpoint.config, "constant_experts", None):
        raise PlanError(
            f"{checkpoint.folder}: vectors stand in the place of some of its experts. Compress the "
            "checkpoint it was made from."
        )
    check(facts.layers, recipe)
    if recipe.reconstruct is not None:
        check_runs_alone(facts)
    if recipe.size is not None and recipe.experts is None:
        shapes(checkpoint, facts, recipe)
    if resolve(recipe).budget == "measured":
        bounds(facts.layers, recipe)
    if recipe.hidden_units is not None:
        before = facts.layers[0].hidden_size
        hidden_field(checkpoint, facts.anatomy.layers, before, recipe.hidden_units)


def run_plan(
    checkpoint: Checkpoint, stats: RoutingStats, recipe: CompressRecipe, facts: Facts | None = None
) -> Plan:
    """The plan of a recipe from statistics; no model is run.

    Raises:
        PlanError: a compression that cannot exist.
        CalibrationError: statistics of another checkpoint.
    """
    facts = facts or read_facts(checkpoint)
    check_possible(checkpoint, facts, recipe)
    stats.belongs_to(checkpoint)

    def plan(recipe: CompressRecipe, counts: Sequence[int] | None = None) -> Plan:
        return make_plan(
            facts.layers,
            stats.layers,
            recipe,
            bank=bank_reader(checkpoint, facts),
            router_weight=router_reader(checkpoint, facts),
            other_params=facts.other_params,
            other_bytes=facts.other_bytes,
            checkpoint_hash=checkpoint.fingerprint,
            statistics_hash=stats.sha256,
            text_hash=stats.text,
            counts=counts,
        )

    measurer = Measurer(checkpoint, facts, stats, plan)
    if recipe.size is not None and recipe.experts is None:
        recipe = measured_shape(measurer, recipe)
    if resolve(recipe).budget == "measured":
        return plan(recipe, measured_counts(measurer, recipe))
    return plan(recipe)


def run_compress(
    recipe: CompressRecipe,
    *,
    stats: RoutingStats | None = None,
    verify: bool = True,
    stages: Stages = silent,
) -> Path:
    """Open, calibrate (unless statistics are given), plan and apply; returns the new folder.

    A killed run, called again with the same recipe, goes on where it stopped.

    Args:
        verify: compare the weight files with their checksums before all else, where they are known.
    """
    checkpoint = Checkpoint.open(recipe.source, trust_remote_code=recipe.trust_remote_code)
    destination = check_destination(recipe.output, checkpoint.folder)
    facts = read_facts(checkpoint)
    check_possible(checkpoint, facts, recipe)
    checkpoint.check()
    if stats is not None:
        stats.belongs_to(checkpoint)
    if verify:
        verify_files(checkpoint.folder, stages("verify"))
    calibrated = _calibrate_once(checkpoint, recipe, stats, destination, stages)
    stats = calibrated.stats
    plan = run_plan(checkpoint, stats, recipe, facts)
    write = partial(_write, checkpoint, plan, destination, stats, facts, recipe, stages)
    if plan.method.sequential or (recipe.reconstruct and recipe.reconstruct.inputs == "walk"):
        batches = calibrated.batches or read_inputs(checkpoint, recipe.calibration)[0]
        return write(partial(apply_walking, batches=batches, device=recipe.device))
    folder = destination
    if processes.is_first():  # no tokens to share out: one process does it
        folder = write(apply)
    processes.wait()
    return folder


def _write(
    checkpoint: Checkpoint,
    plan: Plan,
    destination: Path,
    stats: RoutingStats,
    facts: Facts,
    recipe: CompressRecipe,
    stages: Stages,
    writer: Any,
) -> Path:
    folder: Path = writer(
        checkpoint,
        plan,
        destination,
        stats=stats,
        facts=facts,
        documents=documents(checkpoint, plan, stats),
        workers=recipe.workers,
        progress=stages("compress"),
    )
    return folder


def _calibrate_once(
    checkpoint: Checkpoint,
    recipe: CompressRecipe,
    stats: RoutingStats | None,
    destination: Path,
    stages: Stages,
) -> Calibrated:
    """The statistics given, those a killed run left in the staging folder, or new ones."""
    if stats is not None:
        return Calibrated(stats, [])
    kept = destination.with_name(destination.name + ".partial") / "smelt" / "stats"
    calibration = recipe.calibration
    if needs_gradients(resolve(recipe)):
        calibration = calibration.model_copy(update={"gradients": True})
    wanted = calibration.model_dump(mode="json")
    if processes.by_the_first((kept / "stats.json").is_file):
        found = RoutingStats.load(kept)
        if found.checkpoint == checkpoint.fingerprint and found.details == wanted:
            return Calibrated(found, [])
    calibrated = run_calibration(
        checkpoint, calibration, device=recipe.device, progress=stages("calibrate")
    )
    if processes.is_first():
        calibrated.stats.save(kept)
    processes.wait()
    if calibrated.stats.fisher is None:
        return calibrated
    # Read back a layer at a time: the squared gradients are as large as the experts.
    return replace(calibrated, stats=RoutingStats.load(kept))
