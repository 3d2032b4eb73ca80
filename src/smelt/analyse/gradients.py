"""How gradients flow: norm and signal-to-noise per part, per MoE layer, per expert.

Streaming: one gradient of the model at a time, one mean of it, and for shared experts one mean of
each layer's contribution.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from smelt.analyse.ground import Batch
from smelt.analyse.moments import Signal, numbers
from smelt.analyse.parts import EXPERT_TENSORS, Part, find_parts
from smelt.compress.calibrate import Progress
from smelt.errors import CheckpointError
from smelt.samoe.backbone import SaMoEModel
from smelt.samoe.dispatch import capacity, largest
from smelt.samoe.pool import PoolWeights
from smelt.train.measure import num_choices


@dataclass(frozen=True)
class Load:
    """Tokens per expert of each MoE layer over all micro-batches."""

    chosen: tuple[Int[Tensor, " E"], ...]  # choices of the router
    taken: tuple[Int[Tensor, " E"], ...]  # those within capacity, which the experts learn from


@dataclass(frozen=True)
class GradientFlow:
    """Gradients of M micro-batches, as every part of a model gets them."""

    losses: tuple[float, ...]  # of every micro-batch: what was differentiated
    parts: tuple[Part, ...]
    contributions: tuple[Part, ...]  # per layer that shares experts: what it sends them
    load: Load

    def experts(self) -> list[Part]:
        """Per MoE layer the experts' gradients that come from it, shared or not."""
        own = [p for p in self.parts if p.kind == "experts" and len(p.layers) == 1]
        return sorted([*own, *self.contributions], key=lambda part: part.layers)


def gradient_flow(
    model: PreTrainedModel, batches: Sequence[Batch], *, progress: Progress | None = None
) -> GradientFlow:
    """The gradients of the model's own training loss, in training mode (capacity counts).

    Args:
        model: causal or masked; its gradients and mode are as before afterwards.
        batches: micro-batches of equal size, on any device.
        progress: told (micro-batch, done, total).

    Raises:
        CheckpointError: a loss that is no number.
    """
    parts, loads, losses = find_parts(model), _Loads(model), []
    was_training = model.training
    model.train()
    try:
        with _apart(model) as (contributions, flush):
            for number, batch in enumerate(batches):
                losses.append(_backward(model, batch, loads, number))
                for part in parts:
                    part.add({name: p.grad for name, p in part.parameters.items()})
                flush()
                model.zero_grad(set_to_none=True)
                if progress is not None:
                    progress(f"{losses[-1]:.3f} nats", number + 1, len(batches))
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return GradientFlow(tuple(losses), tuple(parts), tuple(contributions), loads.result())


def _backward(model: PreTrainedModel, batch: Batch, loads: "_Loads", number: int) -> float:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    outputs = model(**inputs, output_router_logits=True, use_cache=False)
    value = float(outputs.loss.detach())
    if not math.isfinite(value):
        raise CheckpointError(
            f"The loss of micro-batch {number} is {value}: the weights are no good. Analyse an "
            "earlier checkpoint of the run (smelt/checkpoints/step-N)."
        )
    loads.add(outputs.get("router_logits") or (), inputs["input_ids"].shape)
    outputs.loss.backward()
    return value


class _Loads:
    """Counts choices as the routers make them."""

    def __init__(self, model: PreTrainedModel) -> None:
        base = model.base_model
        self.num_choices = num_choices(model)
        self.factor = base.config.capacity_factor if isinstance(base, SaMoEModel) else None
        self.counts: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Sequence[Tensor], shape: Sequence[int]) -> None:
        B, T = shape
        for index, layer in enumerate(logits):
            E = layer.shape[-1]
            chosen = largest(layer.detach().float().softmax(-1), self.num_choices).view(B, -1)
            counts = nn.functional.one_hot(chosen, E).sum(1).cpu()  # of every sequence
            taken = counts
            if self.factor is not None:
                limit = capacity(self.factor, self.num_choices, torch.full((B,), T), E)
                taken = counts.minimum(limit[:, None])
            if index == len(self.counts):
                self.counts.append((counts.sum(0) * 0, counts.sum(0) * 0))
            before = self.counts[index]
            self.counts[index] = (before[0] + counts.sum(0), before[1] + taken.sum(0))

    def result(self) -> Load:
        return Load(tuple(c for c, _ in self.counts), tuple(t for _, t in self.counts))


# --- one layer's contribution to experts that several share --------------------------------------


@contextmanager
def _apart(model: PreTrainedModel) -> Iterator[tuple[list[Part], Any]]:
    """Within: every layer that shares experts works on views of their weights, a view each.

    The gradient of a view is the layer's contribution: those of all layers add up to the gradient
    of the experts. Yields a part per such layer, and a function to call after every backward.
    """
    base = model.base_model
    contributions: list[Part] = []
    handles = []
    caught: list[dict[str, Tensor | None]] = []
    if isinstance(base, SaMoEModel):
        layers = base.moe_layers()
        for part in find_parts(model):
            for index in part.layers if part.kind == "experts" and len(part.layers) > 1 else ():
                block = base.config.layout.layers[index].block
                contributions.append(replace(part, block=block, layers=(index,), moments={}))
                caught.append({})
                hook = _giving_views(caught[-1])
                handles.append(layers[index].register_forward_pre_hook(hook))

    def flush() -> None:
        for part, gradients in zip(contributions, caught, strict=True):
            part.add(gradients)
            gradients.clear()

    try:
        yield contributions, flush
    finally:
        for handle in handles:
            handle.remove()


def _giving_views(caught: dict[str, Tensor | None]) -> Any:
    """A hook that gives its layer views of the shared weights, and catches their gradients."""

    def keep(name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            caught[name] = gradient

        return hook

    def view(weights: PoolWeights, name: str) -> Tensor | None:
        tensor: Tensor | None = getattr(weights, name)
        if tensor is None or not tensor.requires_grad:
            return tensor
        seen = tensor.view_as(tensor)
        seen.register_hook(keep(name))
        return seen

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, shared, *rest = inputs
        return (x, replace(shared, **{n: view(shared, n) for n in EXPERT_TENSORS}), *rest)

    return before


def agreement(contributions: Sequence[Part]) -> Float[Tensor, "P L L"]:
    """Per pool entry, the inner products of the layers' mean contributions; summed: of the pool."""
    total = torch.zeros(())
    for name in contributions[0].parameters:
        means = torch.stack([_mean(part, name) for part in contributions])  # [L, E, P, W]
        total = total + torch.einsum("lepw,mepw->plm", means, means)
    return total.cpu()


def _mean(part: Part, name: str) -> Tensor:
    mean = part.moments[name].mean
    assert mean is not None
    return mean


def cosines(gram: Float[Tensor, "L L"]) -> Float[Tensor, "L L"]:
    """Inner products as cosines; nan where a vector is zero."""
    norm = gram.diagonal().sqrt()
    return gram / norm[:, None] / norm[None, :]


def alignment(gram: Float[Tensor, "L L"]) -> float:
    """‖Σ_l c_l‖² / Σ_l ‖c_l‖²: 1 of orthogonal contributions, L of equal ones, 0: they cancel."""
    return float(gram.sum() / gram.diagonal().sum())


# --- as plain numbers ----------------------------------------------------------------------------


def report(flow: GradientFlow) -> dict[str, Any]:
    """Everything in it, for JSON."""
    losses = torch.tensor(flow.losses, dtype=torch.float64)
    whole = [part.signal().pooled() for part in flow.parts]
    return {
        "loss": {"mean": float(losses.mean()), "sd": float(losses.std())},
        "model": Signal(
            whole[0].count,
            torch.stack([one.mean_square for one in whole]).sum(),
            torch.stack([one.scatter for one in whole]).sum(),
        ).numbers(),
        "parts": [
            {**_place(part), "num_values": part.num_values, **part.signal().pooled().numbers()}
            for part in flow.parts
        ],
        "experts_stored": _experts(
            [part for part in flow.parts if part.kind == "experts"], flow.load
        ),
        "experts_by_layer": _experts(flow.experts(), flow.load),
        "contributions": _contributions(flow.contributions),
        "tokens_per_expert": [layer.tolist() for layer in flow.load.chosen],
        "tokens_taken_per_expert": [layer.tolist() for layer in flow.load.taken],
    }


def _place(part: Part) -> dict[str, Any]:
    return {"kind": part.kind, "block": part.block, "layers": list(part.layers)}


def _experts(parts: Sequence[Part], load: Load) -> dict[str, Any] | None:
    """Per part its units [E][P], expert and then pool entry, and what an expert gets on average.

    On average: the norm is the root of the mean square; the SNR the sum of signals over the sum of
    noises, so that an expert without gradient weighs nothing.
    """
    if not parts:
        return None
    signals = [part.signal() for part in parts]
    squares = torch.cat([signal.norm.flatten().square() for signal in signals])
    signal = torch.cat([one.signal.flatten() for one in signals])
    noise = torch.cat([one.noise.flatten() for one in signals])
    tokens = [_tokens(part, one, load) for part, one in zip(parts, signals, strict=True)]
    return {
        "mean": {
            "units": len(squares),
            "norm": float(squares.mean().sqrt()),
            "snr": float(signal.sum() / noise.sum()),
            "tokens": float(torch.cat(tokens).double().mean()),
        },
        "parts": [
            {
                **_place(part),
                "tokens": seen.tolist(),
                "whole": one.pooled().numbers(),
                "units": one.numbers(),
            }
            for part, one, seen in zip(parts, signals, tokens, strict=True)
        ],
    }


def _tokens(part: Part, signal: Signal, load: Load) -> Int[Tensor, " E"]:
    """Tokens that the experts of a part learnt from, over all layers that send them."""
    total = torch.zeros(signal.scatter.shape[0], dtype=torch.int64)
    for layer in part.layers:
        if layer < len(load.taken):  # else a stock family that does not give its router logits
            taken = load.taken[layer]
            total[: len(taken)] += taken  # a layer may see the first experts only
    return total


def _contributions(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Of every group of layers that share experts."""
    groups: dict[int, list[Part]] = {}
    for part in parts:
        groups.setdefault(id(next(iter(part.parameters.values()))), []).append(part)
    found = []
    for group in groups.values():
        gram = agreement(group)
        found.append(
            {
                "layers": [layer for part in group for layer in part.layers],
                "cosine": numbers(cosines(gram.sum(0))),
                "cosine_by_entry": numbers(torch.stack([cosines(one) for one in gram])),
                "alignment": alignment(gram.sum(0)),
                "alignment_by_entry": [alignment(one) for one in gram],
            }
        )
    return found
