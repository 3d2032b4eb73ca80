"""A backward pass over the calibration text: how alike experts' gradients are, and their squares.

The whole model is in memory: unlike the other statistics, these cannot be had a block at a time.
Every sequence goes through alone and without its padding, so no number depends on the batch size;
the price is that of a batch of one: each sequence reads all weights twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smelt.checkpoint.bind import MoeLayer, find_layers, read_bank
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.observe import lift_capacity
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.compress.align import available_memory
from smelt.compress.calibrate import Progress, RoutingStats
from smelt.compress.fisher_files import FisherSums
from smelt.errors import CalibrationError


def with_gradients(
    stats: RoutingStats,
    checkpoint: Checkpoint,
    batches: Sequence[Batch],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> RoutingStats:
    """The statistics with `gradient_gram` in every layer, and the squared gradients beside them.

    The loss of a sequence is the sum of nats over its targets (the negative log-likelihood of the
    text, without auxiliary losses; span corruption for an encoder and decoder), so the squares sum
    up to the empirical Fisher. Gradients have the type that the checkpoint computes in; products
    and squares are float32, Grams are added in float64, squares in float32.

    Raises:
        CalibrationError: the model does not fit in memory, a gradient is not finite, or there is
            nothing to predict.
    """
    layers = find_layers(checkpoint.model)
    rows = [row for batch in batches for row in _sequences(batch)]
    check_gradients_fit(checkpoint, batches, device)
    model = load_model(checkpoint, device)
    sums = [_LayerSums(model, layer) for layer in layers]
    restore = [lift_capacity(model, layer) for layer in layers]
    try:
        for done, row in enumerate(rows, 1):
            _nats(model, row, device).backward()
            for layer in sums:
                layer.flush()
            if progress:
                progress("gradients", done, len(rows))
    finally:
        for back in restore:
            back()
        for layer in sums:
            layer.release()
    found = {layer.name: layer for layer in sums}
    fisher = FisherSums.of(len(rows), {name: layer.squares for name, layer in found.items()})
    known = {
        name: replace(own, gradient_gram=found[name].gram) for name, own in stats.layers.items()
    }
    return replace(stats, layers=known, fisher=fisher)


class _LayerSums:
    """Takes the gradients of one layer's experts as soon as the backward has them, and adds up."""

    def __init__(self, model: nn.Module, layer: MoeLayer) -> None:
        self.name = layer.name
        self.path = layer.experts
        self.module = model.get_submodule(layer.experts)
        self.params = _expert_params(model, layer)
        self.grads: dict[str, Tensor] = {}
        self.gram = torch.zeros(layer.num_stored, layer.num_stored, dtype=torch.float64)
        self.squares: dict[str, Tensor] = {}
        self.hooks = []
        for name, param in self.params.items():
            param.requires_grad_(True)
            hook = param.register_post_accumulate_grad_hook(self._taker(name))
            self.hooks.append(hook)

    def _taker(self, name: str) -> Any:
        def take(param: Tensor) -> None:
            assert param.grad is not None
            self.grads[name], param.grad = param.grad, None
            if len(self.grads) == len(self.params):
                self.flush()

        return take

    @torch.no_grad()
    def flush(self) -> None:
        """Add this sequence's gradients; a tensor that has none (no token chose it) counts as 0."""
        if not self.grads:
            return
        whole = {n: self.grads.get(n, torch.zeros_like(p)) for n, p in self.params.items()}
        self.grads = {}
        bank = read_bank(self.module, self.path, whole.__getitem__)
        gram = torch.zeros_like(self.gram)
        for name, grad in bank.tensors().items():
            flat = grad.flatten(1).float()
            gram += (flat @ flat.T).double().cpu()
            square = flat.square().view(grad.shape)
            if name in self.squares:
                self.squares[name] += square
            else:
                self.squares[name] = square
        if not bool(torch.isfinite(gram).all()):
            raise CalibrationError(
                f"{self.path}: a gradient is not finite. The weights are damaged, or overflow in "
                "the type they are computed in."
            )
        self.gram += gram

    def release(self) -> None:
        """No more gradients; the sums come to the CPU."""
        for hook in self.hooks:
            hook.remove()
        for param in self.params.values():
            param.requires_grad_(False)
        zeros = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.params.items()}
        if not self.squares:  # no sequence reached this layer
            self.squares = read_bank(self.module, self.path, zeros.__getitem__).tensors()
        self.squares = {n: t.cpu().contiguous() for n, t in self.squares.items()}


def _expert_params(model: nn.Module, layer: MoeLayer) -> dict[str, nn.Parameter]:
    """The parameters that make the layer's bank."""
    found: dict[str, nn.Parameter] = {}

    def read(name: str) -> Tensor:
        found[name] = model.get_parameter(name)
        return found[name]

    read_bank(model.get_submodule(layer.experts), layer.experts, read)
    return found


def _sequences(batch: Batch) -> Iterator[Batch]:
    """Every row that has something to predict, alone and without its padding."""
    if batch.labels is None:
        raise CalibrationError("These inputs have no targets, so there is no loss to derive.")
    other = batch.mask if batch.decoder_mask is None else batch.decoder_mask
    for row in range(len(batch.mask)):
        labels = batch.labels[row, other[row]][None]
        if not bool((labels >= 0).any()):
            continue
        inputs = {}
        for name, value in batch.inputs.items():
            mask = other if name.startswith("decoder") else batch.mask
            inputs[name] = value[row, mask[row]][None]
        ones = batch.mask[row, batch.mask[row]][None]
        yield Batch(inputs, ones, labels=labels)


def _nats(model: Any, row: Batch, device: str) -> Tensor:
    """The sum of nats over the targets of one sequence."""
    inputs = {name: value.to(device) for name, value in row.inputs.items()}
    logits = model(**inputs, use_cache=False).logits
    assert row.labels is not None
    labels = row.labels.to(logits.device).flatten()
    return cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=-100, reduction="sum")


def check_gradients_fit(checkpoint: Checkpoint, batches: Sequence[Batch], device: str) -> None:
    """Refuse what cannot be done, before the weights are read.

    Raises:
        CalibrationError: nothing to predict, a checkpoint that is compressed already, or a model
            that does not fit in memory.
    """
    lengths = [_length(row) for batch in batches for row in _sequences(batch)]
    if not lengths:
        raise CalibrationError("No sequence has a token to predict: give more text.")
    layers = find_layers(checkpoint.model)
    if any(layer.num_stored != layer.num_experts for layer in layers):
        raise CalibrationError(
            f"{checkpoint.folder}: is compressed already (mapped form): its experts' gradients are "
            "not those of its router's experts. Calibrate the original."
        )
    needed = memory_needed(checkpoint, layers, max(lengths))
    place = torch.device(device)
    free = available_memory() if place.type == "cpu" else torch.cuda.mem_get_info(place)[0]
    if needed > free:
        raise CalibrationError(
            f"{checkpoint.folder}: gradients need about {needed / 1e9:.1f} GB (the whole model, "
            f"4 bytes per expert weight, a sequence of {max(lengths):,} tokens), and {device} has "
            f"{free / 1e9:.1f} GB free. Use a larger device, shorter sequences "
            "(sequence_length), or a method without gradients."
        )


def _length(row: Batch) -> int:
    """Tokens of a sequence, on both sides where there are two."""
    return sum(value.numel() for name, value in row.inputs.items() if name.endswith("ids"))


def memory_needed(checkpoint: Checkpoint, layers: Sequence[MoeLayer], num_tokens: int) -> int:
    """Bytes of a backward pass, roughly: weights, squares, one layer's gradients, activations.

    Activations by the usual estimate of a transformer block, 34 numbers per token and unit of
    width, with the hidden units of its experts, and the logits; the squares of attention left out.
    """
    model, size = checkpoint.model, checkpoint.dtype.itemsize
    config = checkpoint.config.get_text_config()
    experts = [_num_params(model.get_submodule(layer.experts)) for layer in layers]
    # Two of an expert's matrices or three, of D numbers per hidden unit: 3F, more or less.
    hidden = [
        layer.top_k * params / (layer.num_stored * config.hidden_size)
        for layer, params in zip(layers, experts, strict=True)
    ]
    num_blocks = sum(bool(name) for name in checkpoint.blocks)
    per_token = size * (34 * config.hidden_size * num_blocks + sum(hidden))
    per_token += 12 * config.vocab_size  # logits in float32, their softmax, their gradient
    weights = size * _num_params(model)
    gradients = (size + 8) * max(experts)
    return int(weights + 4 * sum(experts) + gradients + per_token * num_tokens)


def _num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
