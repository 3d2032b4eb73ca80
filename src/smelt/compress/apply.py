"""A plan carried out: read a block, merge or drop its experts, write it, go on to the next.

One block is in memory at a time. Applying a plan twice gives the same bytes, and a killed run goes
on where it stopped and gives the same bytes too.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smelt.checkpoint import sink as sinks
from smelt.checkpoint.bind import MoeLayer, read_bank, write_bank
from smelt.checkpoint.device import give_memory_back
from smelt.checkpoint.sink import Sink, encode
from smelt.checkpoint.source import Checkpoint
from smelt.compress.align import Aligner, activation_cost, weight_cost
from smelt.compress.calibrate import Progress, RoutingStats
from smelt.compress.facts import Facts, read_facts, router_names
from smelt.compress.merge import keep, merge_groups
from smelt.compress.plan import LayerPlan, Plan
from smelt.compress.refit import REFITS
from smelt.compress.router import ROUTERS
from smelt.errors import CheckpointError, PlanError
from smelt.experts import ExpertBank, select
from smelt.plugins import find
from smelt.routing import LayerStats


@dataclass(frozen=True)
class Changed:
    """What a layer becomes, under the names of the model: experts, router rows, the map."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()  # state names of the source that these stand for


class Compressor:
    """Makes the new tensors of one layer at a time; `apply` and `sequential` stream."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        facts: Facts,
        plan: Plan,
        aligner: Aligner,
    ) -> None:
        self.checkpoint = checkpoint
        self.facts = facts
        self.plan = plan
        self.aligner = aligner

    def compress(self, layer: MoeLayer, plan: LayerPlan, stats: LayerStats | None) -> Changed:
        """The layer as the plan has it, in the form the plan has."""
        axes = self.facts.anatomy.axes[layer.name]
        names = frozenset(self.facts.anatomy.experts[layer.name])
        if plan.operator == "keep":
            if self.plan.form != "mapped":
                return Changed()
            bank = self.bank(layer)
            return Changed(self._experts(layer, bank) | self._map(layer, plan), names)
        labels, dominants = torch.tensor(plan.labels), torch.tensor(plan.dominants)
        merged = self.merged(layer, plan, stats, labels, dominants)
        if self.plan.form == "expanded":
            return Changed(self._experts(layer, select(merged, labels)), names)
        if self.plan.form == "mapped":
            return Changed(self._experts(layer, merged) | self._map(layer, plan), names)
        rows = self.rows(layer, plan, stats, labels, dominants)
        return Changed(self._experts(layer, merged) | rows, names | frozenset(axes))

    def bank(self, layer: MoeLayer) -> ExpertBank:
        """The layer's experts as they are; NaN or Inf among them is a CheckpointError."""
        module = self.checkpoint.model.get_submodule(layer.experts)
        bank = read_bank(module, layer.experts, self.checkpoint.read)
        for name, tensor in bank.tensors().items():
            if not all(map(_is_finite, tensor)):
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {layer.experts} has NaN or Inf in {name}. The "
                    "weights are damaged or training diverged: there is nothing sound to merge."
                )
        return bank

    def merged(
        self,
        layer: MoeLayer,
        plan: LayerPlan,
        stats: LayerStats | None,
        labels: Tensor,
        dominants: Tensor,
    ) -> ExpertBank:
        """The G experts that stand for the layer's E."""
        bank = self.bank(layer)
        if plan.operator == "drop":
            return keep(bank, dominants)
        order = None
        if plan.align != "none":
            cost = weight_cost
            if plan.align == "activations":
                cost = activation_cost(_needed(stats, "activation matching"))  # type: ignore[assignment]
            order = self.aligner.orders(
                bank, labels, dominants, reference=plan.reference, cost=cost
            )
        return merge_groups(bank, labels, torch.tensor(plan.weights, dtype=torch.float64), order)

    def _experts(self, layer: MoeLayer, bank: ExpertBank) -> dict[str, Tensor]:
        module = self.checkpoint.model.get_submodule(layer.experts)
        return write_bank(module, layer.experts, bank)

    def _map(self, layer: MoeLayer, plan: LayerPlan) -> dict[str, Tensor]:
        labels = torch.tensor(plan.labels, dtype=torch.int32)
        return {f"{layer.experts}.expert_map": labels}

    def rows(
        self,
        layer: MoeLayer,
        plan: LayerPlan,
        stats: LayerStats | None,
        labels: Tensor,
        dominants: Tensor,
    ) -> dict[str, Tensor]:
        """Router rows, biases and selection biases of the groups."""
        axes = self.facts.anatomy.axes[layer.name]
        whole = {name: self.checkpoint.read(name).movedim(axis, 0) for name, axis in axes.items()}
        values = {name: value[: layer.num_experts] for name, value in whole.items()}
        is_fitted = plan.router in REFITS
        rule = find(ROUTERS, "dominant" if is_fitted else plan.router, "router")
        rows = {name: rule(value, labels, dominants) for name, value in values.items()}
        if is_fitted:
            weight, bias = router_names(layer, values)
            fitted, fitted_bias = find(REFITS, plan.router, "router")(
                values[weight],
                None if bias is None else values[bias],
                _needed(stats, "a refitted router"),
                labels,
                dominants,
                scoring="softmax" if layer.is_softmax else "sigmoid",
                top_k=layer.top_k,
            )
            rows[weight] = fitted
            if bias is not None and fitted_bias is not None:
                rows[bias] = fitted_bias
        # What a router scores beside the experts (shared ones, doing nothing) follows and stays.
        rows = {
            name: torch.cat([row, whole[name][layer.num_experts :]]) for name, row in rows.items()
        }
        return {name: row.movedim(0, axes[name]).contiguous() for name, row in rows.items()}


def _is_finite(tensor: Tensor) -> bool:
    """Whether every element is finite. One expert at a time: nothing of a bank's size is made."""
    # A sum is not finite when a term is not, and is read at the speed of memory; a sum of finite
    # float16 may overflow, so only then is every element looked at.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _needed(stats: LayerStats | None, what: str) -> LayerStats:
    if stats is None:
        raise PlanError(
            f"The plan asks for {what}, which needs the statistics: give them with --stats."
        )
    return stats


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
    key = run_key(checkpoint, plan)
    sink = Sink(destination, checkpoint, key=key, num_bytes=plan.predicted.bytes_after)
    stages = stage_names(checkpoint)
    count = len(stages)
    give_memory_back()
    with Aligner(workers) as aligner:
        compressor = Compressor(checkpoint, facts, plan, aligner)
        for index, stage in enumerate(stages):
            if not sink.has(index, count):
                sink.write(index, count, _compressed(compressor, stage, stats))
            if progress:
                progress(stage or "the rest", index + 1, count)
    return finish(sink, checkpoint, facts, plan, count, documents or {})


def _compressed(
    compressor: Compressor, stage: str, stats: RoutingStats | None
) -> dict[str, Tensor]:
    """What the shard of a stage holds.

    Nobody else holds it: kept while the next block is compressed, it would be counted twice.
    """
    changed = [
        compressor.compress(
            layer,
            compressor.plan.layer(layer.name),
            stats.layers.get(layer.name) if stats else None,
        )
        for layer in compressor.facts.anatomy.layers_of(stage)
    ]
    return stage_tensors(compressor.checkpoint, compressor.facts, compressor.plan, stage, changed)


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


def new_config(checkpoint: Checkpoint, facts: Facts, plan: Plan) -> dict[str, Any]:
    """config.json of the result."""
    without_mtp = bool(facts.anatomy.mtp_keys)
    if plan.form == "expanded":
        return sinks.plain_config(checkpoint.config_dict, without_mtp=without_mtp)
    if plan.form == "mapped":
        stored = {
            layer.experts: plan.layer(layer.name).num_groups for layer in facts.anatomy.layers
        }
        return sinks.mapped_config(checkpoint, stored, without_mtp=without_mtp)
    return sinks.stock_config(checkpoint, plan.layers[0].num_groups, without_mtp=without_mtp)
