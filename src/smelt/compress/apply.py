"""A plan carried out: read a block, merge or drop its experts, write it, go on to the next.

One block is in memory at a time. Applying a plan twice gives the same bytes, and a killed run goes
on where it stopped and gives the same bytes too.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from smelt.checkpoint import sink as sinks
from smelt.checkpoint.device import give_memory_back
from smelt.checkpoint.sink import Sink, encode
from smelt.checkpoint.source import Checkpoint
from smelt.compress.align import Aligner
from smelt.compress.calibrate import Progress, RoutingStats
from smelt.compress.check import positions
from smelt.compress.done import Done
from smelt.compress.factoring import decide_factors, is_decided
from smelt.compress.facts import Facts, read_facts
from smelt.compress.form import new_config
from smelt.compress.layer import Changed, Compressor
from smelt.compress.plan import LayerPlan, Plan, is_changed
from smelt.compress.reconstructor import Reconstructor, check_runs_alone
from smelt.errors import PlanError
from smelt.experts import ExpertBank


def apply(
    checkpoint: Checkpoint,
    plan: Plan,
    destination: str | Path,
    *,
    stats: RoutingStats | None = None,
    facts: Facts | None = None,
    documents: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint that the plan describes; returns its folder.

    Raises:
        PlanError: the plan is of another checkpoint, or needs statistics that are not given.
        CheckpointError: the destination cannot be written, or the weights are damaged.
    """
    facts = facts or read_facts(checkpoint)
    check_plan(checkpoint, plan, stats)
    checkpoint.check()
    new_config(checkpoint, facts, plan)  # refuses what cannot be written before anything is
    if plan.recipe.reconstruct is not None:
        check_runs_alone(facts)
    key = run_key(checkpoint, plan)
    sink = Sink(destination, checkpoint, key=key, num_bytes=plan.predicted.bytes_after)
    stages = stage_names(checkpoint)
    count = len(stages)
    give_memory_back()
    with Aligner(workers) as aligner:
        fisher = None if stats is None else stats.fisher
        compressor = Compressor(checkpoint, facts, plan, aligner, fisher)
        if not is_decided(plan):
            compressor.plan = plan = decided(compressor, sink, stats)
        work = _Blocks(compressor, sink, stages, stats)
        is_resumed = any(sink.has(index, count) for index in range(count))
        for index, stage in enumerate(stages):
            if not sink.has(index, count):
                try:
                    tensors = work.tensors(stage)
                except PlanError:
                    if not is_resumed:  # what an earlier call has written stays
                        sink.abandon()
                    raise
                sink.write(index, count, tensors)
                del tensors
            if progress:
                progress(stage or "the rest", index + 1, count)
    return finish(sink, checkpoint, facts, work.final(), count, documents or {})


def decided(compressor: Compressor, sink: Sink, stats: RoutingStats | None) -> Plan:
    """The plan with its ranks and rows; a killed run that had found them finds them again."""
    kept = sink.staging / "smelt" / "plan.json"
    if kept.is_file():
        return Plan.load(kept)
    plan, facts = compressor.plan, compressor.facts
    layers = {layer.name: layer for layer in facts.anatomy.layers}
    known = stats.layers if stats else {}

    def merged(layer: LayerPlan) -> ExpertBank:
        labels, dominants = torch.tensor(layer.labels), torch.tensor(layer.dominants)
        return compressor.merged(
            layers[layer.name], layer, known.get(layer.name), labels, dominants
        )

    excluded = positions(facts.layers, plan.recipe.excluded, "excluded")
    positions_left = [i for i in range(len(facts.layers)) if i not in excluded]
    try:
        found = decide_factors(plan, facts.layers, known, merged, positions_left)
    except PlanError:  # a budget that does not do
        sink.abandon()
        raise
    found.save(kept)
    return found


class _Blocks:
    """What the shards of a plan hold, block by block; layers are fitted where it says so."""

    def __init__(
        self, compressor: Compressor, sink: Sink, stages: list[str], stats: RoutingStats | None
    ) -> None:
        self.compressor = compressor
        self.stages = stages
        self.stats = stats
        self.done = Done(sink, stages, keeps_tensors=False)
        self.reconstructor: Reconstructor | None = None
        recipe = compressor.plan.recipe.reconstruct
        if recipe is not None:
            checkpoint, facts, plan = compressor.checkpoint, compressor.facts, compressor.plan
            device = torch.device(plan.recipe.device)
            self.reconstructor = Reconstructor(checkpoint, facts, plan, recipe, device=device)

    def tensors(self, stage: str) -> dict[str, Tensor]:
        """What the shard of a stage holds.

        Nobody else holds it: kept while the next block is compressed, it would be counted twice.
        """
        compressor, changed, layers = self.compressor, [], []
        for layer in compressor.facts.anatomy.layers_of(stage):
            plan = compressor.plan.layer(layer.name)
            stats = self.stats.layers.get(layer.name) if self.stats else None
            new = compressor.compress(layer, plan, stats)
            if self.reconstructor is not None and is_changed(plan):
                plan, new = self.reconstructor.fit_to_sample(layer, plan, new, stats)
            changed.append(new)
            layers.append(plan)
        if self.reconstructor is not None and changed:
            self.done.note(stage, layers, changed)
        return stage_tensors(
            compressor.checkpoint, compressor.facts, compressor.plan, stage, changed
        )

    def final(self) -> Plan:
        """The plan with what the fits did."""
        plan = self.compressor.plan
        known = [self.done.read(stage) for stage in self.stages]
        fitted = {layer.name: layer for one in known if one for layer in one.layers}
        layers = tuple(fitted.get(layer.name, layer) for layer in plan.layers)
        return plan.model_copy(update={"layers": layers})


def finish(
    sink: Sink,
    checkpoint: Checkpoint,
    facts: Facts,
    plan: Plan,
    count: int,
    documents: Mapping[str, str],
) -> Path:
    """Configuration, plan and provenance beside the shards, and the folder in its place."""
    provenance = {
        "smelt": version("smelt"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "source": str(checkpoint.config_dict.get("_name_or_path") or checkpoint.folder.name),
        "source_fingerprint": checkpoint.fingerprint,
        "dropped": facts.anatomy.mtp_keys,
    }
    own = {
        "smelt/plan.json": plan.to_json(),
        "smelt/provenance.json": json.dumps(provenance, indent=1) + "\n",
    }
    return sink.finish(count, new_config(checkpoint, facts, plan), {**own, **documents})


def check_plan(checkpoint: Checkpoint, plan: Plan, stats: RoutingStats | None) -> None:
    """Raise PlanError unless checkpoint, plan and statistics belong together."""
    if plan.checkpoint != checkpoint.fingerprint:
        raise PlanError(
            f"The plan is of checkpoint {plan.checkpoint[:12]}…, {checkpoint.folder} is "
            f"{checkpoint.fingerprint[:12]}…. Make a plan for this checkpoint with `smelt plan`."
        )
    if stats is not None and plan.statistics != stats.sha256:
        raise PlanError(
            "The plan was made from other statistics than those given. Plan again, or give the "
            "statistics it was made from."
        )


def run_key(checkpoint: Checkpoint, plan: Plan) -> str:
    """A name for this very compression: source, plan, and the version of smelt."""
    text = f"{version('smelt')} {checkpoint.fingerprint} {plan.to_json()}"
    return hashlib.sha256(text.encode()).hexdigest()


def stage_names(checkpoint: Checkpoint) -> list[str]:
    """The blocks in order, then "" for everything outside them."""
    return [name for name in checkpoint.blocks if name] + [""]


def stage_tensors(
    checkpoint: Checkpoint, facts: Facts, plan: Plan, stage: str, changed: list[Changed]
) -> dict[str, Tensor]:
    """Everything that one shard holds, under its keys on disk."""
    replaced = frozenset().union(*(c.replaced for c in changed)) if changed else frozenset()
    new = {name: tensor for c in changed for name, tensor in c.tensors.items()}
    same = [
        name
        for name in checkpoint.blocks[stage]
        if name in checkpoint.layout and name not in replaced
    ]
    extra = sorted(set(checkpoint.extra_keys) - set(facts.anatomy.mtp_keys)) if not stage else []
    if plan.form == "mapped":
        kept = {name: checkpoint.read(name) for name in same}
        return kept | new | sinks.raw(checkpoint, extra)
    out: dict[str, Tensor] = {}
    for name, tensor in new.items():
        out |= encode(checkpoint, name, tensor)
    keys = {key for name in same for key in checkpoint.layout[name].all_keys()}
    return out | sinks.raw(checkpoint, sorted(keys.union(extra)))
