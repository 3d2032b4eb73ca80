"""The G router rows of a stock checkpoint, fitted to what the original router did on a sample."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from smelt.errors import PlanError
from smelt.routing import LayerStats


class Refit(Protocol):
    """A rule that fits rows to what the router did on the input sample."""

    def __call__(
        self,
        weight: Float[Tensor, "E D"],
        bias: Float[Tensor, " E"] | None,
        stats: LayerStats,
        labels: Int[Tensor, " E"],
        dominants: Int[Tensor, " G"],
        *,
        scoring: str,
        top_k: int,
    ) -> tuple[Float[Tensor, "G D"], Float[Tensor, " G"] | None]:
        """G rows, and G biases where there are E."""


def refit(
    weight: Float[Tensor, "E D"],
    bias: Float[Tensor, " E"] | None,
    stats: LayerStats,
    labels: Int[Tensor, " E"],
    dominants: Int[Tensor, " G"],
    *,
    scoring: str,
    top_k: int,
    steps: int = 60,
    ridge: float = 0.1,
) -> tuple[Float[Tensor, "G D"], Float[Tensor, " G"] | None]:
    """Rows under which each group gets the gate weight that its members got together.

    The target is the top-k gate mass of the original routing on the input sample, summed by
    group; not the mass of the whole softmax, of which a large group gets too much. The loss is the
    cross-entropy (over groups for softmax, per group for sigmoid); L-BFGS starts at the dominant
    rows and runs in coordinates in which the inputs are white, so that `ridge` weighs the mean
    squared change of the logits. The last fifth of every 160 sampled tokens is held out: the best
    rows there are returned, as stored, and the dominant rows if none are better.

    Args:
        labels: -1 for a dropped expert; its gate mass may go to any group not chosen.
        scoring: "softmax" or "sigmoid"; the selection bias of sigmoid routers is not fitted here.
        top_k: experts per token of the new router, only checked.
        steps: L-BFGS iterations at most.

    For merged groups. After dropping, the dominant rows were as good or better in every trial.

    Source: ours. Raises PlanError for a router that does not read what its experts read.
    """
    assert top_k <= len(dominants), "checked when the plan was made"
    problem = _Problem.of(weight, bias, stats, labels, dominants, scoring)
    train, held_out = problem.split()
    best, best_loss = problem.start, held_out.loss(problem.start)
    white, colour = _whitened(train.inputs)
    for change in _path(replace(train, inputs=white), steps, ridge):
        rows = problem.stored(problem.start + change @ colour)
        if (loss := held_out.loss(rows)) < best_loss:
            best, best_loss = rows, loss
    new = best.to(weight.dtype)
    return (new, None) if bias is None else (new[:, :-1].contiguous(), new[:, -1].contiguous())


def check_readable(weight: Float[Tensor, "E D"] | None, stats: LayerStats) -> None:
    """Refuse a layer whose router logits are not its rows times the experts' input."""
    if weight is not None:
        found = stats.input_sample.float() @ weight.cpu().float().T
        logits = stats.sample_logits.float()
        logits, found = logits - logits.mean(0), found - found.mean(0)
        if (found - logits).norm() <= 0.1 * logits.norm():
            return
    raise PlanError(
        "router = refit needs a router that reads what its experts read, and this layer's does "
        "not. Use router = dominant."
    )


REFITS: dict[str, Refit] = {"refit": refit}
"""Rules that need the input sample."""


@dataclass(frozen=True)
class _Problem:
    """Find rows [G, D] so that `inputs @ rows.T` scores the groups as `target` says."""

    inputs: Float[Tensor, "S D"]  # with a column of ones where the router has a bias
    start: Float[Tensor, "G D"]
    base: Float[Tensor, "S G"]  # logits of the start
    target: Float[Tensor, "S G"]  # gate mass of the groups that the token's choices fall in
    chosen: Bool[Tensor, "S G"]
    is_softmax: bool
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "E D"],
        bias: Float[Tensor, " E"] | None,
        stats: LayerStats,
        labels: Int[Tensor, " E"],
        dominants: Int[Tensor, " G"],
        scoring: str,
    ) -> "_Problem":
        """The problem of one layer, on the device of its weights."""
        device = weight.device
        inputs, rows = stats.input_sample.to(device).float(), weight.float()
        if bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            rows = torch.cat([rows, bias.float()[:, None]], 1)
        check_readable(weight, stats)
        start = rows[dominants.to(device)]
        base = inputs @ start.T
        mass = softmax_mass if scoring == "softmax" else sigmoid_mass
        target, chosen = mass(stats, labels, len(dominants))
        target, chosen = target.to(device), chosen.to(device)
        if scoring != "softmax":  # a group that was not chosen keeps the score of its dominant
            target = torch.where(chosen, target, base.sigmoid())
        some = chosen.any(1)
        parts = (t[some] for t in (inputs, base, target, chosen))
        inputs, base, target, chosen = parts
        return cls(inputs, start, base, target, chosen, scoring == "softmax", weight.dtype)

    def split(self) -> tuple["_Problem", "_Problem"]:
        """Four fifths and one fifth of the tokens, in runs of 32: neighbours stay together."""
        num_tokens = len(self.inputs)
        run = max(1, min(32, num_tokens // 20))
        held_out = torch.arange(num_tokens, device=self.inputs.device) // run % 5 == 4
        return self._only(~held_out), self._only(held_out)

    def _only(self, rows: Bool[Tensor, " S"]) -> "_Problem":
        return replace(
            self,
            inputs=self.inputs[rows],
            base=self.base[rows],
            target=self.target[rows],
            chosen=self.chosen[rows],
        )

    def stored(self, rows: Float[Tensor, "G D"]) -> Float[Tensor, "G D"]:
        """The rows as the checkpoint will hold them."""
        return rows.to(self.dtype).float()

    def loss(self, rows: Float[Tensor, "G D"]) -> float:
        return float(self.loss_of(self.inputs @ rows.T))

    def loss_of(self, logits: Float[Tensor, "S G"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of the new gates against the target, in nats per token."""
        if not self.is_softmax:
            loss = binary_cross_entropy_with_logits(logits, self.target, reduction="none")
            return loss.sum(1).mean()
        log_p = logits.log_softmax(1)
        inside = (self.target * log_p).sum(1)
        # The mass of the experts that were not chosen may lie anywhere outside the chosen groups.
        other = (1 - self.target.sum(1)).clamp(min=0)
        full = self.chosen.all(1, keepdim=True)
        outside = log_p.masked_fill(self.chosen & ~full, -torch.inf).logsumexp(1)
        return -(inside + torch.where(full[:, 0], 0.0, other * outside)).mean()


def softmax_mass(
    stats: LayerStats, labels: Int[Tensor, " E"], num_groups: int
) -> tuple[Float[Tensor, "S G"], Bool[Tensor, "S G"]]:
    """What each group's members got of the router's softmax, over the chosen experts only.

    Sums to 1 where the model normalises its top-k weights, else to the share that they have; the
    share of dropped experts is in no group, and left free.
    """
    weight = stats.sample_weight.float()
    total = weight.sum(1, keepdim=True)
    if bool(total.max() - total.min() > 0.02 * total.mean()):
        weight = stats.sample_logits.float().softmax(1).gather(1, stats.sample_choice)
    else:
        weight = weight / total
    return _by_group(weight, stats.sample_choice, labels, num_groups)


def sigmoid_mass(
    stats: LayerStats, labels: Int[Tensor, " E"], num_groups: int
) -> tuple[Float[Tensor, "S G"], Bool[Tensor, "S G"]]:
    """The summed scores of each group's chosen members, as a score below 1."""
    score = stats.sample_logits.float().sigmoid().gather(1, stats.sample_choice)
    mass, chosen = _by_group(score, stats.sample_choice, labels, num_groups)
    return mass.clamp(max=0.999), chosen


def _by_group(
    value: Float[Tensor, "S K"],
    choice: Int[Tensor, "S K"],
    labels: Int[Tensor, " E"],
    num_groups: int,
) -> tuple[Float[Tensor, "S G"], Bool[Tensor, "S G"]]:
    """The value of a token's choices summed by group, and the groups they fall in."""
    group = labels[choice.clamp(min=0)]
    real = (choice >= 0) & (group >= 0)
    group = group.clamp(min=0)
    mass = torch.zeros(len(value), num_groups).scatter_add_(1, group, value * real)
    hits = torch.zeros(len(value), num_groups).scatter_add_(1, group, real.float())
    return mass, hits > 0


def _whitened(inputs: Float[Tensor, "S D"]) -> tuple[Float[Tensor, "S D"], Float[Tensor, "D D"]]:
    """The inputs with unit second moment, and the map back: `rows = start + change @ colour`.

    1e-3 of the mean variance is added in every direction: the sample may be smaller than D.
    """
    moment = (inputs.T @ inputs).double() / max(1, len(inputs))
    moment.diagonal().add_(1e-3 * moment.diagonal().mean().clamp(min=1e-30))
    lower = torch.linalg.cholesky(moment).float()
    white = torch.linalg.solve_triangular(lower, inputs.T, upper=False).T
    eye = torch.eye(len(lower), device=inputs.device)
    return white, torch.linalg.solve_triangular(lower, eye, upper=False)


def _path(problem: _Problem, steps: int, ridge: float) -> Iterator[Float[Tensor, "G D"]]:
    """The changes of the rows, in white coordinates, after every five L-BFGS iterations."""
    change = torch.zeros_like(problem.start, requires_grad=True)
    optimizer = torch.optim.LBFGS([change], max_iter=5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        fit = problem.loss_of(problem.base + problem.inputs @ change.T)
        loss = fit + ridge * change.square().sum() / 2
        loss.backward()
        return loss

    for _ in range(max(1, steps // 5)):
        optimizer.step(closure)
        yield change.detach().clone()
