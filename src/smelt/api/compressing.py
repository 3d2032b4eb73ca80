"""Look at a checkpoint, take its statistics, plan, and make a smaller one."""

from pathlib import Path
from typing import Any

from smelt import processes
from smelt.checkpoint.anatomy import dissect
from smelt.checkpoint.describe import Description, describe
from smelt.checkpoint.device import check_device
from smelt.checkpoint.sink import check_destination
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.verify import verify as verify_files
from smelt.compress import apply as applying
from smelt.compress.calibrate import RoutingStats
from smelt.compress.card import documents
from smelt.compress.defaults import compress_with_defaults
from smelt.compress.facts import read_facts
from smelt.compress.pipeline import (
    Stages,
    check_possible,
    run_calibration,
    run_plan,
    silent,
)
from smelt.compress.plan import Plan
from smelt.errors import PlanError
from smelt.recipe import CalibrationRecipe, CompressRecipe, nest
from smelt.settings import check_recipe


def inspect(
    source: str | Path, *, trust_remote_code: bool = False, verify: bool = False
) -> Description:
    """What a checkpoint holds: layers, experts, bytes by part, the facts of its family.

    No weights are read, unless `verify` compares every file with its checksum (where one is known).

        from smelt import api

        about = api.inspect(source)
        print(about.family, about.num_experts, about.bytes_by_part["experts"])
    """
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    if verify:
        verify_files(checkpoint.folder)
    return describe(checkpoint, dissect(checkpoint))


def calibrate(
    source: str | Path,
    folder: str | Path | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    verify: bool = True,
    stages: Stages = silent,
    **settings: Any,
) -> RoutingStats:
    """The routing statistics of a checkpoint, which every plan at every ratio can be made from.

        from smelt import api

        stats = api.calibrate(source, "stats", text=["python"], num_tokens=2048)
        print(stats.num_tokens, len(stats.layers))

    Args:
        folder: where to save them as well; must not exist.
        verify: compare the weight files with their checksums first, where they are known.
        stages: told of the progress of each stage.
        settings: those of `CalibrationRecipe`: text, num_tokens, sequence_length, batch_size, seed,
            chat_template, sample_tokens, input_gram, gradients, task.
    """
    return calibrate_by(
        source,
        folder,
        check_recipe(settings, CalibrationRecipe),
        device=device,
        trust_remote_code=trust_remote_code,
        verify=verify,
        stages=stages,
    )


def calibrate_by(
    source: str | Path,
    folder: str | Path | None,
    recipe: CalibrationRecipe,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    verify: bool = True,
    stages: Stages = silent,
) -> RoutingStats:
    """`calibrate`, its settings given as a recipe."""
    check_device(device)
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    place = None if folder is None else check_destination(folder, checkpoint.folder)
    dissect(checkpoint)
    checkpoint.check()
    if verify:
        verify_files(checkpoint.folder, stages("verify"))
    found = run_calibration(checkpoint, recipe, device=device, progress=stages("calibrate"))
    if place is not None and processes.is_first():
        staging = place.with_name(place.name + ".partial")
        found.stats.save(staging)
        staging.replace(place)
    return found.stats


def plan(
    source: str | Path,
    stats: RoutingStats | str | Path,
    *,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Plan:
    """What a compression would do to every expert, decided and not yet done; no model is run.

        from smelt import api

        half = api.plan(source, stats, keep=0.5, method="reap")
        print(half.predicted.bytes_after / half.predicted.bytes_before)
        half.save("plan.json")

    Args:
        stats: of this checkpoint, or the folder they were saved in.
        settings: those of `CompressRecipe`: experts or keep, method, form, …
    """
    values = {"source": str(source), "output": "", **nest(settings)}
    recipe = check_recipe(values, CompressRecipe)
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    facts = read_facts(checkpoint)
    check_possible(checkpoint, facts, recipe)
    return run_plan(checkpoint, load_stats(stats), recipe, facts)


def apply(
    source: str | Path,
    plan: Plan | str | Path,
    destination: str | Path,
    *,
    stats: RoutingStats | str | Path | None = None,
    workers: int | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    stages: Stages = silent,
) -> Path:
    """Carry a plan out: a new checkpoint at `destination`, which must not exist.

        from smelt import api

        api.apply(source, "plan.json", "half")

    Args:
        stats: the statistics the plan was made from. Needed for activation matching and a refitted
            router; always good for the model card.
    """
    found = plan if isinstance(plan, Plan) else Plan.load(plan)
    if found.method.sequential:
        raise PlanError(
            "The plan is sequential: its groups are decided while the model is walked. Carry it "
            "out with `smelt compress` and the same settings, or plan without sequential."
        )
    if found.recipe.reconstruct is not None and found.recipe.reconstruct.inputs == "walk":
        raise PlanError(
            "The plan reconstructs layers on the calibration text, which is walked again for that. "
            "Carry it out with `smelt compress` and the same settings, or plan with "
            "reconstruct.inputs=sample: then the inputs that the statistics keep are enough."
        )
    known = None if stats is None else load_stats(stats)
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    check_destination(destination, checkpoint.folder)
    applying.check_plan(checkpoint, found, known)
    if verify:
        verify_files(checkpoint.folder, stages("verify"))
    return applying.apply(
        checkpoint,
        found,
        destination,
        stats=known,
        documents=documents(checkpoint, found, known),
        workers=workers,
        progress=stages("compress"),
    )


def compress(
    source: str | Path,
    destination: str | Path,
    *,
    stats: RoutingStats | str | Path | None = None,
    verify: bool = True,
    stages: Stages = silent,
    **settings: Any,
) -> Path:
    """A smaller checkpoint: calibrate (unless statistics are given), plan and apply.

        from smelt import api

        api.compress(source, "small", keep=0.5, num_tokens=2048)

    A killed run, called again with the same arguments, goes on where it stopped. What is kept of
    each layer is fitted to what the layer did, unless `reconstruct=False`.

    Args:
        destination: the folder to make; must not exist.
        stats: statistics of this checkpoint, or their folder: then nothing is calibrated, and the
            text that a fit walks again is theirs.
        verify: compare the weight files with their checksums first, where they are known.
        settings: those of `CompressRecipe`, and of its `calibration` by their own names. `seed`
            sets both seeds.
    """
    values = {**nest(settings), "source": str(source), "output": str(destination)}
    recipe = check_recipe(values, CompressRecipe)
    return compress_by(recipe, stats=stats, verify=verify, stages=stages)


def compress_by(
    recipe: CompressRecipe,
    *,
    stats: RoutingStats | str | Path | None = None,
    verify: bool = True,
    stages: Stages = silent,
) -> Path:
    """`compress`, its settings given as a recipe."""
    check_device(recipe.device)
    known = None if stats is None else load_stats(stats)
    return compress_with_defaults(recipe, stats=known, verify=verify, stages=stages)


def open_checkpoint(source: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """A checkpoint folder or hub id, opened for reading."""
    return Checkpoint.open(source, trust_remote_code=trust_remote_code)


def load_stats(stats: RoutingStats | str | Path) -> RoutingStats:
    """Statistics as a value: themselves, or those of a folder."""
    return stats if isinstance(stats, RoutingStats) else RoutingStats.load(stats)
