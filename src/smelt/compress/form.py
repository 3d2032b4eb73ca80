"""What a plan makes of a whole checkpoint: its configuration, and its model without weights."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from smelt.checkpoint import mapped, skeleton
from smelt.checkpoint import sink as sinks
from smelt.checkpoint.anatomy import resized
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.width import hidden_field, with_field
from smelt.compress.factoring import is_decided
from smelt.compress.facts import Facts
from smelt.compress.plan import MatrixFactors, Plan


def skeleton_of(
    checkpoint: Checkpoint, facts: Facts, plan: Plan, dtype: torch.dtype
) -> PreTrainedModel:
    """The result's model without weights."""
    if plan.form == "expanded":
        return skeleton.build(checkpoint.cls, checkpoint.config, dtype)
    if plan.form == "mapped":
        config = mapped.SmeltMappedConfig.from_dict(new_config(checkpoint, facts, plan))
        return skeleton.build(mapped.model_class(config), config, dtype)
    before, after = plan.layers[0].num_experts, plan.layers[0].num_groups
    config = resized(checkpoint.config, before, after)
    if (units := plan.layers[0].hidden_units) is not None:
        layers, whole = facts.anatomy.layers, facts.layers[0].hidden_size
        config = with_field(config, hidden_field(checkpoint, layers, whole, units), units)
    return skeleton.build(checkpoint.cls, config, dtype)


def new_config(checkpoint: Checkpoint, facts: Facts, plan: Plan) -> dict[str, Any]:
    """config.json of the result."""
    without_mtp = bool(facts.anatomy.mtp_keys)
    if plan.form == "expanded":
        return sinks.plain_config(checkpoint.config_dict, without_mtp=without_mtp)
    if plan.form == "mapped":
        stored = {
            layer.experts: plan.layer(layer.name).num_groups for layer in facts.anatomy.layers
        }
        factors = {
            layer.experts: _spec(known)
            for layer in facts.anatomy.layers
            if (known := plan.layer(layer.name).factors) is not None and is_decided(plan)
        }
        if factors:
            return sinks.factored_config(checkpoint, stored, factors, without_mtp=without_mtp)
        constants = {
            layer.experts: plan.layer(layer.name).num_constants for layer in facts.anatomy.layers
        }
        return sinks.mapped_config(checkpoint, stored, constants, without_mtp=without_mtp)
    first = plan.layers[0]
    fields = {}
    if first.hidden_units is not None:
        before = facts.layers[0].hidden_size
        name = hidden_field(checkpoint, facts.anatomy.layers, before, first.hidden_units)
        fields[name] = first.hidden_units
    return sinks.stock_config(checkpoint, first.num_groups, fields, without_mtp=without_mtp)


def _spec(factors: Mapping[str, MatrixFactors]) -> dict[str, dict[str, int]]:
    """Rank and kept rows of each matrix, as the configuration has them."""
    return {name: {"rank": f.rank, "rows": sum(f.rows or ())} for name, f in factors.items()}
