"""Each MoE layer beside its compressed self, on the inputs that the original model gives it.

While the original's block is in memory, the compressed layer's weights are loaded beside it and it
runs on the very arguments that the original was called with: shapes, capacity limits, shared
experts and routing are those of the model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt.checkpoint.bind import MoeLayer, is_module_dict
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.place import move_buffers, weights_in
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Stage
from smelt.compress.layer_error import group_of, ratio

Groups = tuple[Tensor, Tensor]
"""The group of each expert of the original [E], and of the compressed layer; −1: none."""


@dataclass(frozen=True)
class LayerFidelity:
    """How near a compressed MoE layer comes to the original on the same inputs."""

    name: str
    error: float  # ‖moe'(x) − moe(x)‖² / ‖moe(x)‖² over the tokens
    routing_agreement: float | None  # share of the original's choices whose group is chosen too
    num_tokens: int


class LayerProbe:
    """Watches the original's layers as they are walked; the compressed ones run beside them."""

    def __init__(
        self,
        compressed: Checkpoint,
        pairs: Sequence[tuple[MoeLayer, MoeLayer]],
        groups: Mapping[str, Groups | None],
        batches: Sequence[Batch],
        sampled: set[int],
    ) -> None:
        """
        Args:
            pairs: each layer of the original with that of the compressed checkpoint.
            groups: by layer name; None: routing is not compared.
            sampled: the batches that are watched.
        """
        self.compressed = compressed
        self.pairs = pairs
        self.groups = groups
        self.batches = batches
        self.sampled = sampled
        self.twin = compressed.skeleton()
        self._sums = {layer.name: _Sums() for layer, _ in pairs}

    def results(self) -> tuple[LayerFidelity, ...]:
        """The layers in the order of the model, after the walk."""
        return tuple(self._sums[layer.name].result(layer.name) for layer, _ in self.pairs)

    @contextlib.contextmanager
    def visit(self, stage: Stage) -> Iterator[None]:
        """Around a block of the original's walk."""
        here = [(ours, theirs) for ours, theirs in self.pairs if ours.block == stage.name]
        device = stage.walk.device
        with contextlib.ExitStack() as stack:
            for ours, theirs in here:
                names = [n for n in self.compressed.state if n.startswith(theirs.name + ".")]
                read = self.compressed.read
                stack.enter_context(weights_in(self.twin, names, read, device))
                module = self.twin.get_submodule(theirs.name)
                move_buffers(module, device)
                stack.enter_context(self._beside(stage, ours, theirs, module))
            yield

    @contextlib.contextmanager
    def _beside(
        self, stage: Stage, ours: MoeLayer, theirs: MoeLayer, module: nn.Module
    ) -> Iterator[None]:
        model, sums = stage.walk.model, self._sums[ours.name]
        choices: list[Tensor] = []
        groups = self.groups[ours.name]

        def run(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            index = stage.walk.current
            if index not in self.sampled:
                choices.clear()
                return
            rows = self.batches[index].side(ours.block).flatten().to(stage.walk.device)
            sums.add_outputs(_hidden(output)[rows], _hidden(module(*args, **kwargs))[rows])
            if groups is not None and len(choices) == 2:
                sums.add_choices(choices[0][rows], choices[1][rows], groups)
            choices.clear()

        hooks = [
            _keep_choice(model.get_submodule(ours.experts), ours, choices.append),
            _keep_choice(self.twin.get_submodule(theirs.experts), theirs, choices.append),
            model.get_submodule(ours.name).register_forward_hook(run, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _keep_choice(module: nn.Module, layer: MoeLayer, keep: Callable[[Tensor], None]) -> Any:
    """A hook that takes the ids [N, K] that an experts module is called with; E: no expert."""
    is_one_hot = is_module_dict(module)

    def hook(_: nn.Module, args: Any) -> None:
        choice: Tensor = args[1]
        if is_one_hot:
            chosen = choice.argmax(-1)
            choice = torch.where(choice.sum(-1) > 0, chosen, layer.num_experts)
        keep(choice)

    return module.register_forward_pre_hook(hook)


def _hidden(output: Any) -> Tensor:
    """The tokens [N, D] in what a module returned: its first tensor."""
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first.reshape(-1, first.shape[-1])


class _Sums:
    """Squared differences and agreeing choices of one layer, float64."""

    def __init__(self) -> None:
        self.num_tokens = self.num_choices = self.num_agreeing = 0
        self.difference = self.norm = 0.0

    def add_outputs(self, before: Tensor, after: Tensor) -> None:
        before, after = before.float(), after.float()
        self.num_tokens += len(before)
        self.difference += float((after - before).square().sum(dtype=torch.float64))
        self.norm += float(before.square().sum(dtype=torch.float64))

    def add_choices(self, before: Tensor, after: Tensor, groups: Groups) -> None:
        """A choice that the original dropped for capacity is none, and does not count."""
        wanted, found = (group_of(c, g) for c, g in zip((before, after), groups, strict=True))
        agrees = (wanted.unsqueeze(-1) == found.unsqueeze(-2)).any(-1) & (wanted >= 0)
        self.num_agreeing += int(agrees.sum())
        self.num_choices += int((before < len(groups[0])).sum())

    def result(self, name: str) -> LayerFidelity:
        agreement = self.num_agreeing / self.num_choices if self.num_choices else None
        return LayerFidelity(name, ratio(self.difference, self.norm), agreement, self.num_tokens)
