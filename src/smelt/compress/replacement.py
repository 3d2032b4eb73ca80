"""A layer of the result, runnable: its own module with the weights that it will have, in float32.

It runs token by token, apart from its model, so that it can be fitted to what the original gave.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from smelt.checkpoint.bind import MoeLayer, is_module_dict, read_bank, write_bank
from smelt.checkpoint.factored import is_factored
from smelt.checkpoint.factored_forward import fold
from smelt.checkpoint.observe import lift_capacity
from smelt.checkpoint.place import move_buffers, put, take_out, weights_in
from smelt.checkpoint.source import Checkpoint
from smelt.compress.closed_form import solve_down
from smelt.compress.facts import Facts
from smelt.compress.form import skeleton_of
from smelt.compress.plan import Plan
from smelt.compress.sample import LayerSample, Reduce
from smelt.recipe import ReconstructRecipe

_CHUNK = 4096
"""Tokens run at once without gradients."""


class Replacement:
    """One layer's module with weights: run on tokens, fitted in place."""

    def __init__(
        self,
        model: nn.Module,
        layer: MoeLayer,
        parameters: dict[str, Tensor],
        start: dict[str, Tensor],
    ) -> None:
        self.model = model
        self.layer = layer
        self.module = model.get_submodule(layer.name)
        self.experts = model.get_submodule(layer.experts)
        self.parameters = parameters  # that may change, float32, by their names in the model
        self.start = start  # their values as they are stored

    def run(self, x: Tensor) -> Tensor:
        """Outputs [N, D] of tokens [N, D], each a sequence of its own."""
        output = self.module(x[:, None])
        first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return first.reshape(x.shape)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of tokens [N, D], the stored experts chosen [N, K], and their weights."""
        outputs, choices, gates = [], [], []
        with self._watched() as calls:
            for part in x.split(_CHUNK):  # an empty one too: a process may have no tokens
                outputs.append(self.run(part))
                choice, gate = calls.pop()
                choices.append(choice)
                gates.append(gate)
        return torch.cat(outputs), torch.cat(choices), torch.cat(gates)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters as they are stored, on the CPU."""
        return {
            n: p.detach().to("cpu", self.start[n].dtype, copy=True)
            for n, p in self.parameters.items()
        }

    @property
    def has_closed_form(self) -> bool:
        """Whether the down projections are matrices whose output goes straight into the layer's."""
        changes = any(n.startswith(self.layer.experts + ".") for n in self.parameters)
        normed = getattr(self.experts, "has_post_expert_norm", False)
        return changes and not is_factored(self.experts) and not normed

    @torch.no_grad()
    def solve(self, sample: LayerSample, reduce: Reduce, recipe: ReconstructRecipe) -> None:
        """Put the best down projections in place."""
        rows = torch.where(~sample.held_out)[0]
        outputs, choices, gates = self.routed(sample.x[rows].float())
        path = self.layer.experts
        values = dict(self.model.named_parameters())
        bank = read_bank(self.experts, path, values.__getitem__)
        new = solve_down(
            bank,
            sample.x[rows].float(),
            choices,
            gates,
            sample.target[rows].float() - outputs,
            ridge=recipe.ridge,
            weight=None if recipe.weight == "none" else sample.weights(recipe.weight)[rows],
            reduce=reduce,
        )
        if not recipe.biases:
            new = new.replaced({n: t for n, t in bank.tensors().items() if n.endswith("bias")})
        for name, value in write_bank(self.experts, path, new).items():
            if name in self.parameters:
                self.parameters[name].copy_(value)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Within: what the experts are called with, as ids of stored experts and their weights."""
        calls: list[tuple[Tensor, Tensor]] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls.append(_stored(self.experts, args[1], args[2]))

        handle = self.experts.register_forward_pre_hook(hook)
        try:
            yield calls
        finally:
            handle.remove()


def _stored(experts: nn.Module, choice: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Stored expert and weight of every choice [N, K]; an id beyond the experts adds nothing."""
    count = int(experts.num_experts)  # type: ignore[arg-type]
    mapping = getattr(experts, "expert_map", None)
    if is_module_dict(experts):
        ids = torch.where(choice.sum(-1) > 0, choice.argmax(-1), choice.shape[-1])
        if mapping is not None:
            padded = torch.cat([mapping, mapping.new_full((1,), count)])
            ids = padded[ids].long()
        return ids, weight.reshape(ids.shape)
    if mapping is None:
        return choice, weight
    stored, summed = fold(mapping, choice, weight, count)
    return stored, summed


class Replacements:
    """Makes them, one at a time, in one skeleton of the result."""

    def __init__(
        self, checkpoint: Checkpoint, facts: Facts, plan: Plan, recipe: ReconstructRecipe
    ) -> None:
        self.checkpoint = checkpoint
        self.facts = facts
        self.recipe = recipe
        self.model = skeleton_of(checkpoint, facts, plan, torch.float32)

    @contextlib.contextmanager
    def of(
        self, layer: MoeLayer, tensors: Mapping[str, Tensor], device: torch.device
    ) -> Iterator[Replacement]:
        """Within: the layer with these new tensors, everything else of it as in the source."""
        module = self.model.get_submodule(layer.name)
        meta = {f"{layer.name}.{name}": param for name, param in module.named_parameters()}
        chosen = self._chosen(layer, module)
        parameters, start = {}, {}
        try:
            for name in module.state_dict():
                path = f"{layer.name}.{name}"
                value = tensors[path] if path in tensors else self.checkpoint.read(path)
                if path in chosen:
                    start[path] = value
                    value = value.to(torch.float32, copy=True)
                put(self.model, path, value, device)
                if path in chosen:
                    parameters[path] = self.model.get_parameter(path).requires_grad_(True)
            move_buffers(module, device)
            restore = lift_capacity(self.model, layer)
            try:
                yield Replacement(self.model, layer, parameters, start)
            finally:
                restore()
        finally:
            take_out(self.model, meta)

    def _chosen(self, layer: MoeLayer, module: nn.Module) -> set[str]:
        """The parameters that the recipe fits."""
        rows = self.facts.anatomy.axes[layer.name]
        chosen = set()
        for name, _ in module.named_parameters():
            path = f"{layer.name}.{name}"
            is_expert = self._is_expert(layer, path)
            is_bias = "bias" in name.rpartition(".")[2]
            if not (is_expert or path in rows) or (is_bias and not self.recipe.biases):
                continue
            if self.recipe.experts if is_expert else self.recipe.router:
                chosen.add(path)
        return chosen

    def _is_expert(self, layer: MoeLayer, path: str) -> bool:
        """Whether a tensor of the result is an expert's own; a norm that all share is not."""
        if not path.startswith(layer.experts + "."):
            return False
        known = self.facts.anatomy.experts[layer.name]
        return path in known or path not in self.checkpoint.state


class Originals:
    """Runs the layers of the source on tokens, one at a time."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.model = checkpoint.skeleton()

    def outputs(self, layer: MoeLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer gives for tokens [N, D] by themselves, and the experts it chooses."""
        module = self.model.get_submodule(layer.name)
        names = [f"{layer.name}.{name}" for name in module.state_dict()]
        with weights_in(self.model, names, self.checkpoint.read, self.device):
            move_buffers(module, self.device)
            return run_alone(self.model, layer, x.to(self.checkpoint.dtype))


@torch.no_grad()
def run_alone(model: nn.Module, layer: MoeLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer with weights gives for tokens [N, D], each a sequence of its own; its choices.

    In the type that the model computes in.
    """
    restore = lift_capacity(model, layer)
    try:
        return Replacement(model, layer, {}, {}).routed(x)[:2]
    finally:
        restore()
