"""One layer compressed: its experts merged, dropped or made smaller, its router's rows, its map."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smelt.checkpoint.bind import MoeLayer, read_bank, write_bank
from smelt.checkpoint.source import Checkpoint
from smelt.compress.align import BY_ACTIVATIONS, Aligner, Cost, weight_cost
from smelt.compress.factoring import factored
from smelt.compress.facts import Facts, router_names
from smelt.compress.fisher_files import FisherSums
from smelt.compress.merge import keep
from smelt.compress.plan import LayerPlan, Plan
from smelt.compress.rebasin import merge_many
from smelt.compress.refit import REFITS
from smelt.compress.router import ROUTERS
from smelt.compress.rules import NEEDS_GRADIENTS, merge_by, needs_tokens
from smelt.compress.units import keep_units, unit_scores
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
    """Makes the new tensors of one layer at a time; `apply` and `walking` stream."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        facts: Facts,
        plan: Plan,
        aligner: Aligner,
        fisher: FisherSums | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.facts = facts
        self.plan = plan
        self.aligner = aligner
        self.fisher = fisher
        self.orders: dict[str, Tensor] = {}  # where layers are merged more than once

    def compress(self, layer: MoeLayer, plan: LayerPlan, stats: LayerStats | None) -> Changed:
        """The layer as the plan has it, in the form the plan has."""
        axes = self.facts.anatomy.axes[layer.name]
        names = frozenset(self.facts.anatomy.experts[layer.name])
        is_whole = plan.hidden_units is None
        if plan.operator == "keep" and self.plan.form != "mapped" and is_whole:
            return Changed()
        labels, dominants = torch.tensor(plan.labels), torch.tensor(plan.dominants)
        merged = self.merged(layer, plan, stats, labels, dominants)
        if plan.operator == "keep" and self.plan.form == "stock":
            return Changed(self._experts(layer, merged), names)
        if self.plan.form == "expanded":
            return Changed(self._experts(layer, _spread(merged, labels)), names)
        if plan.factors is not None:
            assert self.plan.recipe.decompose is not None
            bank = factored(merged, plan, stats, self.plan.recipe.decompose)
            tensors = {f"{layer.experts}.{name}": t for name, t in bank.tensors().items()}
            return Changed(tensors | self._map(layer, plan), names)
        if self.plan.form == "mapped":
            tensors = self._experts(layer, merged) | self._map(layer, plan)
            if plan.num_constants:
                known = _needed(stats, "operator constant").mean_output[labels < 0]
                tensors[f"{layer.experts}.constants"] = known.to(merged.down.dtype)
            return Changed(tensors, names)
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
        """The G experts that stand for the layer's E, with the hidden units that they keep."""
        merged = self._whole(layer, plan, stats, labels, dominants)
        if plan.hidden_units is None:
            return merged
        known = _needed(stats, "hidden_units")
        scores = unit_scores(merged, known.input_sample, known.sample_groups(labels))
        return keep_units(merged, scores, plan.hidden_units)

    def _whole(
        self,
        layer: MoeLayer,
        plan: LayerPlan,
        stats: LayerStats | None,
        labels: Tensor,
        dominants: Tensor,
    ) -> ExpertBank:
        """The same with all hidden units."""
        bank = self.bank(layer)
        if plan.operator == "keep":
            return bank
        if plan.operator in ("drop", "constant"):
            return keep(bank, dominants)
        order = self._order(plan, bank, stats, labels, dominants)
        weights = torch.tensor(plan.weights, dtype=torch.float64)
        if needs_tokens(plan.rule, repaired=plan.repair):
            stats = _needed(stats, f"rule {plan.rule}" if plan.rule != "sum" else "repair")
        return merge_by(
            bank,
            labels,
            weights,
            rule=plan.rule,
            repaired=plan.repair,
            order=order,
            stats=stats,
            fisher=self._fisher_of(layer) if plan.rule in NEEDS_GRADIENTS else None,
        )

    def _order(
        self,
        plan: LayerPlan,
        bank: ExpertBank,
        stats: LayerStats | None,
        labels: Tensor,
        dominants: Tensor,
    ) -> Tensor | None:
        """The hidden units of each expert as its group's reference has them; None: as stored."""
        if plan.align == "none" or plan.name in self.orders:
            return self.orders.get(plan.name)
        cost: Cost = weight_cost
        if plan.align in BY_ACTIVATIONS:
            cost = BY_ACTIVATIONS[plan.align](_needed(stats, "activation matching"))
        if plan.reference == "others":
            order = merge_many(bank, labels, dominants, self.aligner)
        else:
            order = self.aligner.orders(
                bank, labels, dominants, reference=plan.reference, cost=cost
            )
        if self.plan.recipe.decompose is not None:
            self.orders[plan.name] = order
        return order

    def _fisher_of(self, layer: MoeLayer) -> Mapping[str, Tensor]:
        if self.fisher is None:
            raise PlanError(
                "The plan asks for rule fisher, which needs statistics with gradients: give those "
                "it was made from with --stats."
            )
        return self.fisher.read(layer.name)

    def _experts(self, layer: MoeLayer, bank: ExpertBank) -> dict[str, Tensor]:
        module = self.checkpoint.model.get_submodule(layer.experts)
        return write_bank(module, layer.experts, bank)

    def _map(self, layer: MoeLayer, plan: LayerPlan) -> dict[str, Tensor]:
        labels = torch.tensor(plan.labels, dtype=torch.int32)
        # The id after the last stored expert is an empty slot: what a dropped expert gives. Those
        # behind it are constants, in the order of the experts that they stand for.
        gone = labels < 0
        labels = labels.masked_fill(gone, plan.num_groups)
        if plan.num_constants:
            labels[gone] += 1 + torch.arange(plan.num_constants, dtype=torch.int32)
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


def _spread(bank: ExpertBank, labels: Tensor) -> ExpertBank:
    """An expert for each label: that of its group, or zeros for a dropped one."""
    found = select(bank, labels.clamp(min=0))
    for tensor in found.tensors().values() if bool((labels < 0).any()) else ():
        tensor[(labels < 0).to(tensor.device)] = 0
    return found


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
