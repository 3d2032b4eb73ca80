"""What is kept of a layer, fitted to what the whole layer did: no labels, one layer at a time.

A replacement is anything with parameters and a forward: fewer experts, merged ones, factors. Its
squared error on calibration tokens, as a share of the target's squared norm, is brought down; a
share of the tokens is held out, and decides which state is kept. What is kept is judged as the
checkpoint will store it, so a fit never ends worse there than it began.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from smelt.compress.descend import descend
from smelt.compress.sample import LayerSample, Reduce, alone
from smelt.recipe import ReconstructRecipe

Run = Callable[[Tensor], Tensor]
"""The replacement's forward: tokens [N, D] to outputs [N, D]."""
Solve = Callable[[LayerSample, Reduce], None]
"""Changes the parameters in closed form; its effect is judged like any other step's."""

_CHUNK = 1024
"""Tokens whose error is taken at once."""


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
    path = descend(judge.loss, parameters, sample, recipe, start=start, reduce=reduce, seed=seed)
    for steps, ended in path if best else ():
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

    def loss(self, rows: Tensor, num_tokens: int) -> Tensor:
        """Of these tokens, a part of a batch of `num_tokens`: about 1 where nothing is matched."""
        return self._squares(rows).sum() / (num_tokens * self.mean_norm or 1.0)

    def _squares(self, rows: Tensor) -> Tensor:
        y = self.run(self.sample.x[rows].float())
        wrong = (y - self.sample.target[rows].float()).square().sum(1)
        return wrong * self.weight[rows]
