"""The error that a plan makes in each layer, on the stored input sample: no model is run."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smelt.checkpoint import skeleton
from smelt.checkpoint.anatomy import resized
from smelt.checkpoint.bind import MoeLayer, is_module_dict
from smelt.checkpoint.place import weights_in
from smelt.checkpoint.source import Checkpoint
from smelt.compress.align import Aligner
from smelt.compress.calibrate import Progress, RoutingStats
from smelt.compress.facts import Facts
from smelt.compress.layer import Compressor
from smelt.compress.plan import LayerPlan, Plan, is_changed
from smelt.errors import PlanError
from smelt.experts import ExpertBank, mixture
from smelt.routing import LayerStats

_CPU = torch.device("cpu")
Routed = tuple[Tensor, Tensor]
"""Choices [S, K] among the compressed layer's experts, and their weights."""


def layer_errors(
    checkpoint: Checkpoint,
    facts: Facts,
    plan: Plan,
    stats: RoutingStats,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """‖layer'(x) − layer(x)‖² / ‖layer(x)‖² by layer name, over the sampled calibration inputs.

    Of the routed experts alone: a shared expert, which no plan changes, adds to neither. Inputs are
    those of the original model (one-shot). In the mapped and expanded forms a token is served by
    the groups of the experts it chose, with their weights; in the stock form by what the new
    router rows choose, weighted as the family's own module does it. Where that module cannot be
    run alone (gemma4, whose blocks hold the experts themselves), the mapped rule stands in for it.

    A fit made on the same sample (router `refit`, activation matching) looks better here than on
    other text; `fidelity` on held-out text is the fair judge.

    Args:
        plan: of this checkpoint, from these statistics; the groups of a sequential plan are the
            one-shot ones.
        workers: alignment solves at a time.

    Raises:
        PlanError: a plan that decomposes, whose ranks and rows are decided when it is applied.
    """
    if plan.recipe.decompose is not None:
        raise PlanError(
            "The error of decomposed experts cannot be measured before ranks and rows are decided. "
            "Leave --measure out, apply the plan, and hold the result against the original with "
            "smelt evaluate --original."
        )
    errors: dict[str, float] = {}
    router = _NewRouter(checkpoint, plan) if plan.form == "stock" else None
    with Aligner(workers) as aligner:
        compressor = Compressor(checkpoint, facts, plan, aligner, stats.fisher)
        for number, layer in enumerate(facts.anatomy.layers):
            decided = plan.layer(layer.name)
            found = stats.layers.get(layer.name)
            errors[layer.name] = 0.0
            if is_changed(decided) and found is not None:
                errors[layer.name] = _error(compressor, router, layer, decided, found)
            if progress:
                progress(layer.name, number + 1, len(facts.anatomy.layers))
    return errors


def _error(
    compressor: Compressor,
    router: "_NewRouter | None",
    layer: MoeLayer,
    plan: LayerPlan,
    stats: LayerStats,
) -> float:
    labels, dominants = torch.tensor(plan.labels), torch.tensor(plan.dominants)
    before = _mixed(compressor.bank(layer), stats, (stats.sample_choice, stats.sample_weight))
    routed = (group_of(stats.sample_choice, labels), stats.sample_weight)
    if router is not None and layer.name != layer.block and plan.operator != "keep":
        rows = compressor.rows(layer, plan, stats, labels, dominants)
        routed = router.route(layer, rows, stats.input_sample)
    merged = compressor.merged(layer, plan, stats, labels, dominants)
    difference = _mixed(merged, stats, routed) - before
    if plan.num_constants:
        known = torch.where(labels < 0)[0]
        vectors = stats.mean_output[known].to(merged.down.dtype).float()
        is_one = stats.sample_choice[:, :, None] == known
        difference += (is_one * stats.sample_weight[:, :, None]).sum(1).float() @ vectors
    return ratio(
        float(difference.square().sum(dtype=torch.float64)),
        float(before.square().sum(dtype=torch.float64)),
    )


@torch.no_grad()
def _mixed(bank: ExpertBank, stats: LayerStats, routed: Routed) -> Tensor:
    """The experts' output for the sample; two choices of one group add up.

    An id beyond the experts (a slot that does nothing) adds nothing.
    """
    choice, weight = routed
    choice = choice.masked_fill(choice >= bank.num_experts, -1)
    return mixture(bank, stats.input_sample.to(bank.up.dtype), choice, weight)


class _NewRouter:
    """Routes as a stock checkpoint of the plan will: its own module runs, its experts do not."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        first = plan.layers[0]
        config = resized(checkpoint.config, first.num_experts, first.num_groups)
        self.checkpoint = checkpoint
        self.model: PreTrainedModel = skeleton.build(checkpoint.cls, config, checkpoint.dtype)

    @torch.no_grad()
    def route(self, layer: MoeLayer, rows: dict[str, Tensor], x: Tensor) -> Routed:
        """What tokens [S, D] choose by new router rows, given under their names in the model."""
        inside = [n for n in self.checkpoint.state if n.startswith(layer.name + ".")]
        names = [n for n in inside if not n.startswith(layer.experts + ".")]

        def read(name: str) -> Tensor:
            return rows[name] if name in rows else self.checkpoint.read(name)

        experts = self.model.get_submodule(layer.experts)
        with weights_in(self.model, names, read, _CPU), _caught(experts) as calls:
            # Each token is a sequence of its own: a limit of tokens per sequence never binds.
            self.model.get_submodule(layer.name)(x.to(self.checkpoint.dtype)[:, None])
        ((choice, weight),) = calls
        if is_module_dict(experts):
            choice = choice.argmax(-1)
        return choice, weight


@contextmanager
def _caught(experts: nn.Module) -> Iterator[list[Routed]]:
    """Within: calls of an experts module are taken down, and return zeros."""
    calls: list[Routed] = []

    def forward(x: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        calls.append((choice, weight))
        return torch.zeros_like(x)

    experts.forward = forward
    try:
        yield calls
    finally:
        del experts.forward


def group_of(choice: Tensor, groups: Tensor) -> Tensor:
    """The group of each choice; −1 for a dropped expert, and for ids beyond the experts."""
    groups = torch.cat([groups, groups.new_full((1,), -1)]).to(choice.device)
    return groups[choice.clamp(max=len(groups) - 1)]


def ratio(difference: float, norm: float) -> float:
    """A squared error as a share of the squared norm; no difference is 0 whatever the norm."""
    if difference == 0:
        return 0.0
    return difference / norm if norm else math.inf
