"""The tokens that a layer is fitted on: what goes into it and what comes out, as a model is walked.

The last sequences are held out: documents follow each other in them, so those are mostly others.
Tokens of several processes keep the order that they have in one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt import processes
from smelt.checkpoint.bind import MoeLayer
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.observe import lift_capacity
from smelt.checkpoint.walk import Stage
from smelt.compress.sample import LayerSample

_RUN = 32
"""Neighbouring tokens that are held out together, where there are few sequences."""


@dataclass(frozen=True)
class Chosen:
    """Which tokens of each batch are kept, and which of those are held out."""

    rows: list[Tensor]  # of each batch, among its flattened tokens
    held_out: Tensor  # of all kept tokens, in order
    starts: list[int]  # of each batch, among the kept tokens

    @classmethod
    def of(cls, masks: Sequence[Tensor], tokens: int | None, share: float) -> "Chosen":
        """Whole sequences from the beginning, as many as hold `tokens` (None: all).

        Args:
            masks: [B, T] of each batch; True: a real token.
            share: held out: of the sequences, the last ones; where there are too few, runs of
                tokens.
        """
        rows: list[Tensor] = []
        sequence: list[Tensor] = []
        number = total = 0
        for mask in masks:
            kept = mask.clone()
            for index in range(len(mask)):
                if tokens is not None and total >= tokens:
                    kept[index] = False
                total += int(kept[index].sum())
            numbers = number + torch.arange(len(mask))[:, None].expand(mask.shape)
            number += int(kept.any(1).sum())
            flat = torch.where(kept.flatten())[0]
            rows.append(flat)
            sequence.append(numbers.flatten()[flat])
        starts = [sum(len(r) for r in rows[:i]) for i in range(len(rows))]
        return cls(rows, _held_out(torch.cat(sequence), number, share), starts)


def _held_out(sequence: Tensor, count: int, share: float) -> Tensor:
    """Which tokens are held out, by the number of each one's sequence."""
    if count * share >= 1:
        return sequence >= count - min(count - 1, round(count * share))
    return held_out_runs(len(sequence), share)


def held_out_runs(num_tokens: int, share: float) -> Tensor:
    """The same where nothing is known of sequences: the last of every 1/share runs of tokens."""
    every = max(2, round(1 / share))
    run = max(1, min(_RUN, num_tokens // (4 * every)))
    return torch.arange(num_tokens) // run % every == every - 1


class Capture:
    """Keeps inputs and outputs of the layers of a block, of the chosen tokens."""

    def __init__(
        self,
        batches: Sequence[Batch],
        layers: Sequence[MoeLayer],
        *,
        tokens: int | None,
        held_out: float,
        dtype: torch.dtype | None,
    ) -> None:
        """
        Args:
            dtype: of what is kept; None: as the model computes.
        """
        self.dtype = dtype
        self.share = processes.share(len(batches))  # of this process
        sides = {layer.block: [b.side(layer.block) for b in batches] for layer in layers}
        self.chosen = {name: Chosen.of(m, tokens, held_out) for name, m in sides.items()}

    @contextlib.contextmanager
    def watching(
        self, stage: Stage, layers: Sequence[MoeLayer]
    ) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
        """Within: what goes into these layers and what they give is kept, by layer and batch."""
        model = stage.walk.model
        caught: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
        with contextlib.ExitStack() as stack:
            for layer in layers:
                stack.callback(lift_capacity(model, layer))
                hook = self._hook(stage, layer, caught[layer.name])
                module = model.get_submodule(layer.name)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield caught

    def _hook(self, stage: Stage, layer: MoeLayer, caught: list[tuple[Tensor, Tensor]]) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            caught.append(
                (self.picked(stage, layer, x), self.picked(stage, layer, first_tensor(output)))
            )

        return hook

    def picked(self, stage: Stage, layer: MoeLayer, value: Tensor) -> Tensor:
        """The chosen tokens of the batch now running."""
        index = self.share[stage.walk.current % len(self.share)]
        rows = self.chosen[layer.block].rows[index]
        flat = value.reshape(-1, value.shape[-1])
        return flat[rows.to(flat.device)].to(self.dtype or flat.dtype)

    def outputs(self, stage: Stage, layer: MoeLayer, indices: range) -> Tensor:
        """The output on these batches of the block that the layer is in, of the chosen tokens."""
        parts = [
            self.picked(stage, layer, first_tensor(output)) for _, output in stage.outputs(indices)
        ]
        return torch.cat(parts)

    def sample(self, layer: MoeLayer, caught: Sequence[tuple[Tensor, Tensor]]) -> LayerSample:
        """What was kept of a layer, as one sample."""
        x, target = (torch.cat(parts) for parts in zip(*caught, strict=True))
        chosen = self.chosen[layer.block]
        first = chosen.starts[self.share.start]
        held_out = chosen.held_out[first : first + len(x)].to(x.device)
        return LayerSample(x, target, held_out, first, len(chosen.held_out))


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a module returned."""
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


def adds_up(stage: Stage, layer: MoeLayer, index: int) -> bool:
    """Whether a block's output grows by what its layer's output grows by.

    Not where a norm follows the experts, or where a block holds several streams. Tried out on one
    batch: the layer's output is doubled.
    """
    module = stage.walk.model.get_submodule(layer.name)
    given: list[Tensor] = []

    def doubled(_: nn.Module, _args: Any, output: Any) -> Any:
        value = first_tensor(output)
        given.append(value)
        return (2 * value, *output[1:]) if isinstance(output, (tuple, list)) else 2 * value

    ((_, plain),) = stage.outputs([index])
    handle = module.register_forward_hook(doubled)
    try:
        ((_, more),) = stage.outputs([index])
    finally:
        handle.remove()
    plain, more = first_tensor(plain).float(), first_tensor(more).float()
    wanted = given[0].float()
    if wanted.numel() != plain.numel():
        return False
    return bool((more - plain - wanted.reshape(plain.shape)).norm() <= 0.1 * wanted.norm())
