"""What is kept of a layer, fitted to what the whole layer did: no labels, one layer at a time.

A replacement is anything with parameters and a forward: fewer experts, merged ones, factors. Its
squared error on calibration tokens, as a share of the target's squared norm, is brought down; a
share of the tokens is held out, and decides which state is kept. What is kept is judged as the
checkpoint will store it, so a fit never ends worse there than it began.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import cos, pi, sqrt
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from smelt.recipe import ReconstructRecipe

Run = Callable[[Tensor], Tensor]
"""The replacement's forward: tokens [N, D] to outputs [N, D]."""
Reduce = Callable[[Sequence[Tensor]], None]
"""Sums tensors over processes, in place; each process holds a part of the tokens."""
Solve = Callable[["LayerSample", Reduce], None]
"""Changes the parameters in closed form; its effect is judged like any other step's."""

_CHUNK = 1024
"""Tokens whose error is taken at once."""


def alone(_: Sequence[Tensor]) -> None:
    """The sum over one process."""


@dataclass(frozen=True)
class LayerSample:
    """Tokens of one layer: what goes in, what should come out, and how much each counts."""

    x: Float[Tensor, "N D"]
    target: Float[Tensor, "N D"]
    held_out: Bool[Tensor, " N"]
    first: int = 0  # where these tokens lie among those of all processes
    total: int | None = None  # tokens of all processes

    @property
    def num_tokens(self) -> int:
        """Of all processes."""
        return len(self.x) if self.total is None else self.total

    def weights(self, rule: str) -> Float[Tensor, " N"]:
        """How much the squared error of each token counts.

        `none`: 1. `saliency`: the norm of what the layer should give. `relative`: one over its
        square, so that every token's error counts as a share of its own output.
        """
        if rule == "none":
            return torch.ones(len(self.x), device=self.x.device)
        norm: Tensor = torch.linalg.vector_norm(self.target, dim=1, dtype=torch.float32)
        if rule == "saliency":
            return norm
        square = norm.square()
        inverse: Tensor = torch.where(square > 0, 1 / square, 0.0)
        return inverse


@dataclass(frozen=True)
class Fit:
    """What a fit did: relative squared errors on the held-out tokens, and why it ended."""

    before: float
    after: float
    solved: float | None  # after the closed form; None: it was not tried
    steps: int  # gradient steps taken
    best_step: int  # the one whose state is kept; 0: that of the closed form, or the start
    num_tokens: int  # fitted on, of all processes
    num_params: int
    ended: Literal["done", "no better", "diverged", "out of time"]
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)


def fit(
    run: Run,
    parameters: Mapping[str, Tensor],
    sample: LayerSample,
    recipe: ReconstructRecipe,
    *,
    start: Mapping[str, Tensor],
    solve: Solve | None = None,
    reduce: Reduce = alone,
    seed: int = 0,
) -> Fit:
    """Fit the parameters, in place, to what the sample asks for; what came of it is returned.

    First the closed form, if there is one; then Adam, its step scaled to the size of each
    parameter, on batches of `recipe.batch_tokens`, along a cosine to zero. The state that is best
    on the held-out tokens is kept; where none is better than the start, the start is.

    Args:
        parameters: float32 leaves that `run` reads; left at the kept state, rounded as stored.
        start: their values now, in the types in which they are stored; not changed.
        seed: draws the batches.

    Source: ours; block-wise reconstruction is known from quantisation (BRECQ, arXiv:2102.05426).
    """
    judge = _Judge(run, sample, recipe, reduce)
    state = _State(parameters, start)
    state.put(start)
    before = best = judge.error()
    kept: Mapping[str, Tensor] = start
    solved = None
    ended: Literal["done", "no better", "diverged", "out of time"] = "done"
    if solve is not None:
        solve(sample, reduce)
        state.round()
        solved = judge.error()
        if solved < best:
            best, kept = solved, state.copy()
        else:
            state.put(kept)
    steps = best_step = 0
    curve = [(0, best)]
    for steps, ended in _descend(judge, state, start, recipe, seed) if best else ():
        error = judge.error()
        curve.append((steps, error))
        if error < best:
            best, best_step = error, steps
            kept = state.copy()
        if not error <= max(10 * before, 1.0):  # worse than giving nothing; NaN too
            ended = "diverged"
            break
    state.put(kept)
    if best_step:  # judged unrounded on the way: a copy in full precision would cost its bytes
        best = judge.error()
        if not best < before:
            state.put(start)
            best, best_step = before, 0
    if ended == "done" and best >= before:
        ended = "no better"
    return Fit(
        before=before,
        after=best,
        solved=solved,
        steps=steps,
        best_step=best_step,
        num_tokens=judge.num_fitted,
        num_params=sum(p.numel() for p in parameters.values()),
        ended=ended,
        curve=tuple(curve),
    )


class _State:
    """The parameters as a whole: copied as stored, put in place, rounded as stored."""

    def __init__(self, parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        self.stored = {name: value.dtype for name, value in start.items()}

    def copy(self) -> dict[str, Tensor]:
        return {n: p.detach().to(self.stored[n], copy=True) for n, p in self.parameters.items()}

    @torch.no_grad()
    def put(self, kept: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(kept[name])

    @torch.no_grad()
    def round(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(parameter.to(self.stored[name]))


class _Judge:
    """Errors of the replacement: of a batch, with gradients, and of all held-out tokens."""

    def __init__(
        self, run: Run, sample: LayerSample, recipe: ReconstructRecipe, reduce: Reduce
    ) -> None:
        self.run = run
        self.sample = sample
        self.reduce = reduce
        self.weight = sample.weights(recipe.weight)
        square = self.weight * sample.target.float().square().sum(1)
        held = sample.held_out
        sums = torch.stack(
            [
                square[held].sum(dtype=torch.float64),
                square[~held].sum(dtype=torch.float64),
                (~held).sum().double(),
            ]
        )
        reduce([sums])
        self.held_norm, fitted_norm, count = sums.tolist()
        self.num_fitted = int(count)
        self.mean_norm = fitted_norm / max(1, count)
        self.held = torch.where(held)[0]

    @torch.no_grad()
    def error(self) -> float:
        """On the held-out tokens: Σ w‖y − target‖² / Σ w‖target‖²."""
        total = torch.zeros(1, dtype=torch.float64, device=self.sample.x.device)
        for rows in self.held.split(_CHUNK) if len(self.held) else ():
            total += self._squares(rows).sum(dtype=torch.float64)
        self.reduce([total])
        found = float(total)
        if not self.held_norm:
            return float(found > 0)
        return found / float(self.held_norm)

    def agreed(self, seconds: float) -> float:
        """The mean over processes: all of them stop at the same step."""
        sums = torch.tensor([seconds, 1.0], dtype=torch.float64, device=self.sample.x.device)
        self.reduce([sums])
        return float(sums[0] / sums[1])

    def loss(self, rows: Tensor, num_tokens: int) -> Tensor:
        """Of these tokens, a part of a batch of `num_tokens`: about 1 where nothing is matched."""
        return self._squares(rows).sum() / (num_tokens * self.mean_norm or 1.0)

    def _squares(self, rows: Tensor) -> Tensor:
        y = self.run(self.sample.x[rows].float())
        wrong = (y - self.sample.target[rows].float()).square().sum(1)
        return wrong * self.weight[rows]


def _descend(
    judge: _Judge,
    state: _State,
    start: Mapping[str, Tensor],
    recipe: ReconstructRecipe,
    seed: int,
) -> Iterator[tuple[int, Literal["done", "out of time"]]]:
    """Adam steps; yields after every so many of them, and after the last."""
    if not recipe.steps or not state.parameters:
        return
    pulls = _pulls(start, recipe.anchor)
    optimiser, sizes = _optimiser(state.parameters.values(), recipe.rate)
    batches = _batches(judge.sample, recipe.batch_tokens, seed)
    every = max(1, recipe.steps // recipe.evaluations)
    begun = time.monotonic()
    for step in range(1, recipe.steps + 1):
        share = (step - 1) / recipe.steps
        if recipe.seconds is not None:
            share = max(share, judge.agreed(time.monotonic() - begun) / recipe.seconds)
        warm = min(1.0, step / max(1.0, 0.05 * recipe.steps))
        for group, size in zip(optimiser.param_groups, sizes, strict=True):
            group["lr"] = recipe.rate * size * warm * (1 + cos(pi * min(1.0, share))) / 2
        rows, count = next(batches)
        # One product for the whole batch: a second one's gradients would lie beside the first's.
        if len(rows):
            judge.loss(rows, count).backward()
        for p in state.parameters.values():
            if p.grad is None:  # a process without tokens of this batch
                p.grad = torch.zeros_like(p)
        judge.reduce([p.grad for p in state.parameters.values() if p.grad is not None])
        for name, weight in pulls.items():
            _pull(state.parameters[name], start[name], weight)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)  # not kept while the error is taken
        if share >= 1:
            yield step, "out of time"
            return
        if step % every == 0 or step == recipe.steps:
            yield step, "done"


def _pulls(start: Mapping[str, Tensor], anchor: float) -> dict[str, float]:
    """By parameter, what a difference from the start weighs: 2 · anchor / ‖start‖²."""
    if not anchor:
        return {}
    squares = {n: sum(float(row.float().square().sum()) for row in t) for n, t in start.items()}
    return {name: 2 * anchor / (square or 1.0) for name, square in squares.items()}


@torch.no_grad()
def _pull(parameter: Tensor, start: Tensor, weight: float) -> None:
    """Add the gradient of the anchor; a row at a time, for its memory."""
    assert parameter.grad is not None
    for grad, now, before in zip(parameter.grad, parameter, start, strict=True):
        grad.add_(now - before.to(now), alpha=weight)


def _optimiser(parameters: Iterable[Tensor], rate: float) -> tuple[torch.optim.Adam, list[float]]:
    """Adam with a group for each parameter, and the root mean square of each at the start."""
    groups = list(parameters)
    sizes = [float(p.detach().float().square().mean().sqrt()) for p in groups]
    largest = max(sizes) or 1.0
    sizes = [
        size or largest / sqrt(max(1, p.shape[-1])) for size, p in zip(sizes, groups, strict=True)
    ]
    adam = torch.optim.Adam(
        [{"params": [p], "lr": rate * s} for p, s in zip(groups, sizes, strict=True)],
        betas=(0.9, 0.95),
        fused=True,  # no temporaries of a parameter's size
    )
    return adam, sizes


def _batches(sample: LayerSample, size: int, seed: int) -> Iterator[tuple[Tensor, int]]:
    """This process's rows of batch after batch, and the batch's tokens: permutations, repeated.

    The order is of the tokens of all processes, so that their number does not change a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    stop = sample.first + len(sample.x)
    own = (~sample.held_out).cpu()
    while True:
        order = torch.randperm(sample.num_tokens, generator=generator)
        for batch in order.split(size):
            here = batch[(batch >= sample.first) & (batch < stop)] - sample.first
            rows = here[own[here]]
            yield rows.to(sample.x.device), len(batch)
