"""Gradient steps of a fit: Adam, its rate by the size of each parameter, along a cosine to zero."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from math import cos, pi, sqrt
from typing import Literal

import torch
from torch import Tensor

from smelt.compress.sample import LayerSample, Reduce, alone
from smelt.recipe import ReconstructRecipe

Loss = Callable[[Tensor, int], Tensor]
"""Of the sample's rows [N], a part of a batch of so many tokens: what they add to its loss."""


def descend(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    sample: LayerSample,
    recipe: ReconstructRecipe,
    *,
    start: Mapping[str, Tensor],
    reduce: Reduce = alone,
    seed: int = 0,
) -> Iterator[tuple[int, Literal["done", "out of time"]]]:
    """Change the parameters in place; yields after every so many steps, and after the last.

    Args:
        parameters: float32 leaves that the loss reads.
        start: what an anchor holds them to; not changed.
        reduce: sums over processes, each with a part of the tokens.
        seed: draws the batches.
    """
    if not recipe.steps or not parameters:
        return
    batches = _batches(sample, recipe.batch_tokens, seed)
    every = max(1, recipe.steps // recipe.evaluations)
    begun = time.monotonic()
    with ExitStack() as stack:
        adams = _Adams(parameters, start, recipe, reduce, stack)
        for step in range(1, recipe.steps + 1):
            share = (step - 1) / recipe.steps
            if recipe.seconds is not None:
                spent = _agreed(time.monotonic() - begun, reduce, sample.x.device)
                share = min(1.0, max(share, spent / recipe.seconds))
            warm = min(1.0, step / max(1.0, 0.05 * recipe.steps))
            adams.set_rate(warm * (1 + cos(pi * share)) / 2)
            rows, count = next(batches)
            # One product for a whole batch: a second one's gradients would lie beside the first's.
            if len(rows):
                loss(rows, count).backward()
            adams.finish()
            if share >= 1:
                yield step, "out of time"
                return
            if step % every == 0 or step == recipe.steps:
                yield step, "done"


class _Adams:
    """An Adam for each parameter, which steps as soon as that gradient is complete.

    In one process that is within the backward pass: no gradient is kept beside the others.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        recipe: ReconstructRecipe,
        reduce: Reduce,
        hooks: ExitStack,
    ) -> None:
        self.parameters = parameters
        self.start = start
        self.reduce = reduce
        self.rates = _rates(parameters, recipe.rate)
        self.pulls = _pulls(start, recipe.anchor)
        # Fused: no temporaries of a parameter's size.
        self.each = {
            name: torch.optim.Adam([p], lr=self.rates[name], betas=(0.9, 0.95), fused=True)
            for name, p in parameters.items()
        }
        self.moved: set[str] = set()
        if reduce is alone:
            for name, p in parameters.items():
                hook = p.register_post_accumulate_grad_hook(lambda _, n=name: self._move(n))
                hooks.callback(hook.remove)

    def set_rate(self, scale: float) -> None:
        """Of the next step, as a share of each parameter's own rate."""
        for name, adam in self.each.items():
            adam.param_groups[0]["lr"] = self.rates[name] * scale

    def finish(self) -> None:
        """The step of the parameters that the backward pass has not moved."""
        left = {name: p for name, p in self.parameters.items() if name not in self.moved}
        for p in left.values():
            if p.grad is None:  # nothing reached it: no token of the batch is in this process
                p.grad = torch.zeros_like(p)
        self.reduce([p.grad for p in left.values() if p.grad is not None])
        for name in left:
            self._move(name)
        self.moved.clear()

    def _move(self, name: str) -> None:
        if name in self.pulls:
            _pull(self.parameters[name], self.start[name], self.pulls[name])
        self.each[name].step()
        self.each[name].zero_grad(set_to_none=True)
        self.moved.add(name)


def _agreed(seconds: float, reduce: Reduce, device: torch.device) -> float:
    """The mean over processes: all of them stop at the same step."""
    sums = torch.tensor([seconds, 1.0], dtype=torch.float64, device=device)
    reduce([sums])
    return float(sums[0] / sums[1])


def _rates(parameters: Mapping[str, Tensor], rate: float) -> dict[str, float]:
    """`rate` by the root mean square of each parameter; one of zeros has it from the largest."""
    sizes = {n: float(p.detach().float().square().mean().sqrt()) for n, p in parameters.items()}
    largest = max(sizes.values()) or 1.0
    return {
        name: rate * (size or largest / sqrt(max(1, parameters[name].shape[-1])))
        for name, size in sizes.items()
    }


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
