"""From a recipe to a compressed checkpoint: open, calibrate, plan, apply. Commands call this."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smelt.checkpoint.inputs import Batch, make_batches
from smelt.checkpoint.sink import check_destination
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.verify import verify as verify_files
from smelt.compress.apply import apply
from smelt.compress.calibrate import Progress, RoutingStats, calibrate
from smelt.compress.card import model_card
from smelt.compress.check import check
from smelt.compress.decide import make_plan
from smelt.compress.facts import Facts, bank_reader, read_facts, router_reader
from smelt.compress.plan import Plan
from smelt.compress.sequential import apply_sequentially
from smelt.errors import CalibrationError
from smelt.recipe import CalibrationRecipe, CompressRecipe
from smelt.text import TokenBlocks, parse_source, tokenize

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


def read_text(checkpoint: Checkpoint, recipe: CalibrationRecipe) -> TokenBlocks:
    """The calibration text of a recipe as token blocks of this checkpoint's tokenizer.

    Raises:
        CalibrationError: text that cannot be read, or token ids beyond the model's vocabulary.
    """
    blocks = tokenize(
        [parse_source(source) for source in recipe.text],
        checkpoint.tokenizer,
        num_tokens=recipe.num_tokens,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        chat_template=recipe.chat_template,
    )
    vocabulary = checkpoint.config.get_text_config().vocab_size
    largest = int(blocks.input_ids.max())
    if largest >= vocabulary:
        raise CalibrationError(
            f"{checkpoint.folder}: the tokenizer gives id {largest}, the model has {vocabulary} "
            "tokens. Tokenizer and weights are of different models."
        )
    return blocks


def run_calibration(
    checkpoint: Checkpoint,
    recipe: CalibrationRecipe,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Calibrated:
    """The routing statistics of a checkpoint on the text of a recipe, in one pass."""
    blocks = read_text(checkpoint, recipe)
    batches = make_batches(checkpoint, blocks, recipe.batch_size, recipe.seed)
    stats = calibrate(
        checkpoint,
        batches,
        text=blocks.sha256,
        device=device,
        sample_tokens=recipe.sample_tokens,
        seed=recipe.seed,
        input_gram=recipe.input_gram,
        details=recipe.model_dump(mode="json"),
        progress=progress,
    )
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


def run_plan(
    checkpoint: Checkpoint, stats: RoutingStats, recipe: CompressRecipe, facts: Facts | None = None
) -> Plan:
    """The plan of a recipe from statistics; no model is run.

    Raises:
        PlanError: a compression that cannot exist.
        CalibrationError: statistics of another checkpoint.
    """
    facts = facts or read_facts(checkpoint)
    check(facts.layers, recipe)
    stats.belongs_to(checkpoint)
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
    )


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
    check(facts.layers, recipe)
    checkpoint.check()
    if stats is not None:
        stats.belongs_to(checkpoint)
    if verify:
        verify_files(checkpoint.folder, stages("verify"))
    calibrated = _calibrate_once(checkpoint, recipe, stats, destination, stages)
    stats = calibrated.stats
    plan = run_plan(checkpoint, stats, recipe, facts)
    write = partial(_write, checkpoint, plan, destination, stats, facts, recipe, stages)
    if recipe.sequential:
        batches = calibrated.batches or make_batches(
            checkpoint,
            read_text(checkpoint, recipe.calibration),
            recipe.calibration.batch_size,
            recipe.calibration.seed,
        )
        return write(partial(apply_sequentially, batches=batches, device=recipe.device))
    return write(apply)


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
        documents={"README.md": model_card(checkpoint, plan, stats)},
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
    wanted = recipe.calibration.model_dump(mode="json")
    if (kept / "stats.json").is_file():
        found = RoutingStats.load(kept)
        if found.checkpoint == checkpoint.fingerprint and found.details == wanted:
            return Calibrated(found, [])
    calibrated = run_calibration(
        checkpoint, recipe.calibration, device=recipe.device, progress=stages("calibrate")
    )
    calibrated.stats.save(kept)
    return calibrated
