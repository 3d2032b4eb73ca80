"""The weights of a layer's experts as one value, and the few operations everything else is made of.

Letters: E experts, M experts made, F hidden units, D model width, N tokens, K choices per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

Activation = Callable[[Tensor | None, Tensor], Tensor]
"""Hidden units from the pre-activations: `(gate or None, up) -> hidden`, elementwise over F."""


def gated(function: Callable[[Tensor], Tensor]) -> Activation:
    """The usual activation: `function(gate) * up`, or `function(up)` where there is no gate."""
    return lambda gate, up: function(up) if gate is None else function(gate) * up


@dataclass(frozen=True)
class ExpertBank:
    """The weights of E feed-forward experts, stacked on axis 0, in [out, in] orientation."""

    up: Float[Tensor, "E F D"]
    down: Float[Tensor, "E D F"]
    gate: Float[Tensor, "E F D"] | None = None  # None: an ungated expert (Switch)
    up_bias: Float[Tensor, "E F"] | None = None
    gate_bias: Float[Tensor, "E F"] | None = None
    down_bias: Float[Tensor, "E D"] | None = None
    activation: Activation = gated(torch.nn.functional.silu)

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def hidden_size(self) -> int:
        """F, the hidden units of one expert."""
        return self.up.shape[1]

    @property
    def model_size(self) -> int:
        """D, the width of the expert's input and output."""
        return self.up.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by field name, each with the expert on axis 0."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "activation"}
        return {name: value for name, value in named.items() if value is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "ExpertBank":
        """A bank with `function` applied to every tensor."""
        return self.replaced({name: function(t) for name, t in self.tensors().items()})

    def replaced(self, tensors: dict[str, Tensor]) -> "ExpertBank":
        """A bank with these tensors in the place of its own of the same name."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)


HIDDEN_AXIS = {"up": 0, "gate": 0, "down": 1, "up_bias": 0, "gate_bias": 0}
"""Where the F hidden units lie in one expert's tensors; `down_bias` has none."""


def select(bank: ExpertBank, ids: Int[Tensor, " M"]) -> ExpertBank:
    """The experts named by `ids`, in that order."""
    return bank.map(lambda t: t[ids.to(t.device)])


def combine(bank: ExpertBank, coef: Float[Tensor, "M E"]) -> ExpertBank:
    """M new experts, each a weighted sum of the bank's E experts: float32 sums, cast once.

    The general form. `compress.merge` streams it group by group, so that no float32 copy of a
    whole layer exists.
    """
    weights = coef.float()
    return bank.map(lambda t: torch.einsum("me,e...->m...", weights, t.float()).to(t.dtype))


def permute_hidden(bank: ExpertBank, order: Int[Tensor, "E F"]) -> ExpertBank:
    """The same functions, hidden units reordered: new unit j of expert e is unit order[e, j].

    An order that names fewer units leaves the others out.
    """

    def reorder(name: str, tensor: Tensor) -> Tensor:
        if name not in HIDDEN_AXIS:
            return tensor
        axis = HIDDEN_AXIS[name]
        return torch.stack(
            [t.index_select(axis, o) for t, o in zip(tensor, order.to(tensor.device), strict=True)]
        )

    return bank.replaced({name: reorder(name, t) for name, t in bank.tensors().items()})


def hidden(bank: ExpertBank, expert: int, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
    """The hidden activations of one expert: what its down projection reads."""
    up = linear(x, bank.up[expert], None if bank.up_bias is None else bank.up_bias[expert])
    if bank.gate is None:
        return bank.activation(None, up)
    gate = linear(x, bank.gate[expert], None if bank.gate_bias is None else bank.gate_bias[expert])
    return bank.activation(gate, up)


def apply(bank: ExpertBank, expert: int, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """f_e(x): the output of one expert, before any routing weight."""
    bias = None if bank.down_bias is None else bank.down_bias[expert]
    return linear(hidden(bank, expert, x), bank.down[expert], bias)


def mixture(
    bank: ExpertBank,
    x: Float[Tensor, "N D"],
    choice: Int[Tensor, "N K"],
    weight: Float[Tensor, "N K"],
) -> Float[Tensor, "N D"]:
    """The layer's output Σ_k weight·f_choice(x), in float32; a choice below 0 adds nothing."""
    out = torch.zeros(x.shape[0], bank.down.shape[1], dtype=torch.float32, device=x.device)
    for expert in choice.unique().tolist():
        if expert < 0:
            continue
        token, slot = torch.where(choice == expert)
        y = apply(bank, expert, x[token]).float() * weight[token, slot, None].float()
        out.index_add_(0, token, y)
    return out
