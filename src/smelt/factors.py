"""Experts whose matrices are low rank plus a few whole rows: W ≈ U V + S, stored compactly.

Letters: G experts stored, O rows of a matrix (its outputs), I columns (its inputs), R rank, M rows
of S that are kept, of all experts together; N tokens, K choices, D model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import linear, silu

from smelt.experts import Activation, ExpertBank, gated

MATRICES = ("gate", "up", "down")
"""The matrices of an expert; an ungated one has no gate."""


@dataclass(frozen=True)
class LowRankSparse:
    """One matrix of G experts: W_g ≈ U_g V_g + S_g, S_g zero but for whole rows."""

    u: Float[Tensor, "G O R"]
    v: Float[Tensor, "G R I"]
    rows: Float[Tensor, "M I"]  # the kept rows of S: expert by expert, ascending
    row_ids: Int32[Tensor, " M"]  # expert · O + row

    @property
    def num_experts(self) -> int:
        return self.u.shape[0]

    @property
    def rank(self) -> int:
        return self.u.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, O, I), of the matrices that it stands for."""
        return self.u.shape[0], self.u.shape[1], self.v.shape[2]

    @property
    def num_params(self) -> int:
        """Stored weights; a row's id is none."""
        return prod(self.u.shape) + prod(self.v.shape) + prod(self.rows.shape)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.u, self.v, self.rows, self.row_ids))

    def expert_rows(self) -> list[slice]:
        """Where each expert's rows lie in `rows`."""
        G, out, _ = self.shape
        counts = torch.bincount(self.row_ids.long() // out, minlength=G).cumsum(0).tolist()
        return [slice(a, b) for a, b in zip([0, *counts], counts, strict=False)]

    def dense(self) -> Float[Tensor, "G O I"]:
        """The matrices, float32 sums cast once, one expert at a time."""
        out = self.u.new_empty(self.shape)
        if out.is_meta:
            return out
        num_rows = self.shape[1]
        wide = torch.promote_types(out.dtype, torch.float32)
        for expert, own in enumerate(self.expert_rows()):
            matrix = self.u[expert].to(wide) @ self.v[expert].to(wide)
            matrix.index_add_(0, self.row_ids[own] - expert * num_rows, self.rows[own].to(wide))
            out[expert] = matrix
        return out


@dataclass(frozen=True)
class FactorBank:
    """The experts of a layer in factored form; the counterpart of ExpertBank."""

    up: LowRankSparse
    down: LowRankSparse
    gate: LowRankSparse | None = None  # None: an ungated expert (Switch)
    up_bias: Float[Tensor, "G F"] | None = None
    gate_bias: Float[Tensor, "G F"] | None = None
    down_bias: Float[Tensor, "G D"] | None = None
    activation: Activation = gated(silu)

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], activation: Activation = gated(silu)
    ) -> "FactorBank":
        """The inverse of `tensors()`."""

        def matrix(name: str) -> LowRankSparse:
            parts = (tensors[f"{name}_{part}"] for part in ("u", "v", "rows", "row_ids"))
            return LowRankSparse(*parts)

        return cls(
            up=matrix("up"),
            down=matrix("down"),
            gate=matrix("gate") if "gate_u" in tensors else None,
            up_bias=tensors.get("up_bias"),
            gate_bias=tensors.get("gate_bias"),
            down_bias=tensors.get("down_bias"),
            activation=activation,
        )

    @classmethod
    def joined(cls, parts: Sequence["FactorBank"]) -> "FactorBank":
        """The experts of several banks of one kind, in that order."""
        tensors = {
            name: torch.cat([part.tensors()[name] for part in parts])
            for name in parts[0].tensors()
            if not name.endswith("_row_ids")
        }
        for name, matrix in parts[0].matrices().items():
            ids, start = [], 0
            for part in parts:
                ids.append(part.matrices()[name].row_ids + start)
                start += part.num_experts * matrix.shape[1]
            tensors[f"{name}_row_ids"] = torch.cat(ids)
        return cls.of(tensors, parts[0].activation)

    @property
    def num_experts(self) -> int:
        return self.up.num_experts

    @property
    def hidden_size(self) -> int:
        """F, the hidden units of one expert."""
        return self.up.shape[1]

    @property
    def model_size(self) -> int:
        """D, the width of the expert's input and output."""
        return self.up.shape[2]

    def matrices(self) -> dict[str, LowRankSparse]:
        """The matrices there are, by name."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: matrix for name, matrix in named.items() if matrix is not None}

    def biases(self) -> dict[str, Tensor]:
        """The biases there are, by matrix."""
        named = {"gate": self.gate_bias, "up": self.up_bias, "down": self.down_bias}
        return {name: bias for name, bias in named.items() if bias is not None}

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor under its name in the checkpoint: "up_u", "up_rows", "up_bias", …."""
        found = {
            f"{name}_{part}": getattr(matrix, part)
            for name, matrix in self.matrices().items()
            for part in ("u", "v", "rows", "row_ids")
        }
        return found | {f"{name}_bias": bias for name, bias in self.biases().items()}

    @property
    def num_params(self) -> int:
        """Stored weights and biases."""
        matrices = sum(matrix.num_params for matrix in self.matrices().values())
        return matrices + sum(prod(bias.shape) for bias in self.biases().values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dense(self) -> ExpertBank:
        """The experts with their matrices multiplied out."""
        return ExpertBank(
            up=self.up.dense(),
            down=self.down.dense(),
            gate=None if self.gate is None else self.gate.dense(),
            up_bias=self.up_bias,
            gate_bias=self.gate_bias,
            down_bias=self.down_bias,
            activation=self.activation,
        )


def apply(bank: FactorBank, expert: int, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """f_e(x): the output of one expert, before any routing weight. No dense W is made."""
    biases = bank.biases()

    def product(name: str, x: Tensor) -> Tensor:
        matrix, bias = bank.matrices()[name], biases.get(name)
        y = linear(linear(x, matrix.v[expert]), matrix.u[expert])
        own = matrix.expert_rows()[expert]
        places = matrix.row_ids[own] - expert * matrix.shape[1]
        y = y.index_add(1, places, linear(x, matrix.rows[own]))
        return y if bias is None else y + bias[expert]

    gate = None if bank.gate is None else product("gate", x)
    return product("down", bank.activation(gate, product("up", x)))
