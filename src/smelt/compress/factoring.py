"""Merged experts into factors: which rank each matrix gets, which rows of S stay, and the result.

A layer is read and merged when it is asked for. Ranks and rows are decided over all layers before
the first is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smelt.compress.decompose import (
    choose_rows,
    matrices_of,
    pack,
    residual_scores,
    spectrum,
    truncated_svd,
)
from smelt.compress.grams import grams_of
from smelt.compress.plan import LayerFacts, LayerPlan, MatrixFactors, Plan
from smelt.compress.predict import ROW_ID_BYTES, predicted_again, sized
from smelt.compress.ranks import rank_cost, rank_for_energy, ranks_under_budget
from smelt.errors import PlanError
from smelt.experts import ExpertBank
from smelt.factors import FactorBank
from smelt.recipe import DecomposeRecipe
from smelt.routing import LayerStats

Merged = Callable[[LayerPlan], ExpertBank]
"""Reads and merges the experts of a layer."""

Key = tuple[int, str]
"""A matrix of all experts of a layer: the layer's position, the matrix's name."""

_CHUNK = 4096
"""Tokens whose hidden units are differentiated at once."""


def is_decided(plan: Plan) -> bool:
    """Whether ranks and rows of all layers are known."""
    wanted = plan.recipe.decompose
    if wanted is None:
        return True
    known = [one for layer in plan.layers for one in (layer.factors or {}).values()]
    return bool(known) and all(one.rows is not None for one in known)


def decide_factors(
    plan: Plan,
    facts: Sequence[LayerFacts],
    stats: Mapping[str, LayerStats],
    merged: Merged,
    positions: Sequence[int],
) -> Plan:
    """The plan with every rank and every number of kept rows in it; its bytes are exact then.

    Args:
        stats: by layer name; only data-aware decompositions read them.
        merged: called once for each layer, twice where ranks are not fixed.
        positions: of the layers that are decomposed.
    """
    assert plan.recipe.decompose is not None
    decider = Decider(plan.recipe.decompose, plan.layers, facts, stats, merged, positions)
    ranks = decider.ranks()
    counts = decider.row_counts(ranks)
    layers = list(plan.layers)
    for i in positions:
        factors = {
            name: MatrixFactors(rank=ranks[i, name], rows=counts[i, name])
            for name in facts[i].matrices
        }
        layer = layers[i].model_copy(update={"factors": factors})
        layers[i] = sized(layer, facts[i], plan.recipe)
    return predicted_again(plan, facts, stats, layers)


def factored(
    bank: ExpertBank, layer: LayerPlan, stats: LayerStats | None, wanted: DecomposeRecipe
) -> FactorBank:
    """The experts of a decided layer as factors: the best rows, as many as the plan says."""
    assert layer.factors is not None
    ranks = {name: one.rank for name, one in layer.factors.items()}
    found = factors_of(bank, ranks, look(bank, layer, stats, wanted), wanted)
    packed = {}
    for name, (u, v, scores) in found.items():
        rows = layer.factors[name].rows
        assert rows is not None
        mask = torch.zeros(scores.shape, dtype=torch.bool)
        for expert, number in enumerate(rows):
            mask[expert, scores[expert].argsort(descending=True, stable=True)[:number]] = True
        packed[name] = pack(matrices_of(bank)[name], u, v, mask.to(u.device))
    return FactorBank(
        up=packed["up"],
        down=packed["down"],
        gate=packed.get("gate"),
        up_bias=bank.up_bias,
        gate_bias=bank.gate_bias,
        down_bias=bank.down_bias,
        activation=bank.activation,
    )


@dataclass(frozen=True)
class Seen:
    """What the sampled inputs of a layer say about its experts' matrices."""

    grams: Mapping[str, Sequence[Tensor]]  # by matrix, [I, I] of each expert
    gains: dict[str, Float[Tensor, "G O"]]
    """By matrix: the mean square that an expert's output loses for one that a row's loses."""


def look(
    bank: ExpertBank, layer: LayerPlan, stats: LayerStats | None, wanted: DecomposeRecipe
) -> Seen | None:
    """What the sample says of the merged experts; None where the recipe does not ask."""
    if wanted.svd == "plain" and wanted.rows == "norm":
        return None
    if stats is None:
        raise PlanError(
            "A data-aware decomposition reads the sampled inputs: give the statistics with "
            "--stats, or set decompose.svd: plain and decompose.rows: norm."
        )
    x = stats.input_sample.to(bank.up.device)
    group = stats.sample_groups(torch.tensor(layer.labels)).to(x.device)
    return Seen(grams_of(bank, x, group), _gains(bank, x, group))


def _gains(
    bank: ExpertBank, x: Float[Tensor, "S D"], group: Int[Tensor, "S K"]
) -> dict[str, Float[Tensor, "G O"]]:
    """To first order, and as if a unit's slope had nothing to do with the row's error.

    A row of up or gate moves one hidden unit, by the slope of the activation there, and with it the
    output along one column of down. A row of down is the output.
    """
    column = bank.down.float().square().sum(1).double()
    gains = {name: torch.zeros_like(column) for name in matrices_of(bank) if name != "down"}
    for expert in range(bank.num_experts):
        own = x[(group == expert).any(1)]
        for part in own.split(_CHUNK) if len(own) else ():
            for name, slope in _slopes(bank, expert, part).items():
                gains[name][expert] += slope.double().square().sum(0) / len(own)
    found = {name: gain * column for name, gain in gains.items()}
    return found | {"down": column.new_ones(bank.down.shape[:2])}


def _slopes(
    bank: ExpertBank, expert: int, x: Float[Tensor, "N D"]
) -> dict[str, Float[Tensor, "N F"]]:
    """∂ hidden unit / ∂ its pre-activation, in up and in gate."""
    before = {}
    with torch.enable_grad():
        for name, weight in matrices_of(bank).items():
            if name == "down":
                continue
            bias = getattr(bank, f"{name}_bias")
            value = x.float() @ weight[expert].float().T
            value = value if bias is None else value + bias[expert].float()
            before[name] = value.detach().requires_grad_()
        total = bank.activation(before.get("gate"), before["up"]).sum()
        slopes = torch.autograd.grad(total, list(before.values()))
    return dict(zip(before, slopes, strict=True))


def factors_of(
    bank: ExpertBank, ranks: Mapping[str, int], seen: Seen | None, wanted: DecomposeRecipe
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """U [G, O, R], V [G, R, I], and what each row of S is worth [G, O], of every matrix.

    Worth per entry, so that long rows and short ones compare. By output: the mean square that the
    layer's output loses with the row, to first order (`_gains`); by norm: the row's mean square.
    """
    found = {}
    for name, weight in matrices_of(bank).items():
        grams = None if seen is None else seen.grams[name]
        aware = grams if wanted.svd == "data-aware" else None
        u, v = truncated_svd(weight, ranks[name], aware, ridge=wanted.ridge)
        if wanted.rows == "norm" or seen is None:
            scores = residual_scores(weight, u, v)
        else:
            scores = residual_scores(weight, u, v, grams) * seen.gains[name]
        found[name] = (u, v, scores.cpu())
    return found


class Decider:
    """Ranks and rows of all the layers that are decomposed."""

    def __init__(
        self,
        wanted: DecomposeRecipe,
        layers: Sequence[LayerPlan],
        facts: Sequence[LayerFacts],
        stats: Mapping[str, LayerStats],
        merged: Merged,
        positions: Sequence[int],
    ) -> None:
        self.wanted, self.layers, self.facts = wanted, layers, facts
        self.stats, self.merged, self.positions = stats, merged, positions
        self.keys = [(i, name) for i in positions for name in facts[i].matrices]

    def ranks(self) -> dict[Key, int]:
        """Of every matrix: fixed, by energy, or under a budget of bytes."""
        fixed = self.wanted.fixed_rank
        if fixed is not None:
            return {(i, name): min(fixed, *self.facts[i].matrices[name]) for i, name in self.keys}
        shares = self._energy_shares()
        if self.wanted.energy is not None:
            return {
                k: rank_for_energy(s.sqrt()[None], self.wanted.energy) for k, s in shares.items()
            }
        found: dict[Key, int] = {}
        for keys in self._budgets(self.wanted.across):
            spectra = [shares[key].sqrt()[None] for key in keys]
            costs = [self._cost(key) for key in keys]
            chosen = ranks_under_budget(spectra, costs, self._budget(keys))
            found |= dict(zip(keys, chosen, strict=True))
        return found

    def row_counts(self, ranks: Mapping[Key, int]) -> dict[Key, tuple[int, ...]]:
        """Kept rows of every expert's matrices: one threshold for all, or one for each layer."""
        scores: dict[Key, Tensor] = {}
        for i in self.positions:
            bank, seen = self._seen(i)
            own = {name: ranks[i, name] for name in self.facts[i].matrices}
            scale = self._output_energy(i) if self.wanted.rows == "output" else 1.0
            for name, (_, _, found) in factors_of(bank, own, seen, self.wanted).items():
                scores[i, name] = found / scale
        counts: dict[Key, tuple[int, ...]] = {}
        for keys in self._budgets(self.wanted.threshold):
            lengths = [self.facts[i].matrices[name][1] for i, name in keys]
            masks = choose_rows([scores[key] for key in keys], lengths, self.wanted.keep)
            counts |= {k: tuple(m.sum(1).tolist()) for k, m in zip(keys, masks, strict=True)}
        return counts

    def _seen(self, position: int) -> tuple[ExpertBank, Seen | None]:
        layer = self.layers[position]
        bank = self.merged(layer)
        return bank, look(bank, layer, self.stats.get(layer.name), self.wanted)

    def _energy_shares(self) -> dict[Key, Float[Tensor, " S"]]:
        """σ² by rank, summed over a matrix's experts, as a share of all: matrices compare by it."""
        found = {}
        for i in self.positions:
            bank, seen = self._seen(i)
            is_aware = seen is not None and self.wanted.svd == "data-aware"
            for name, weight in matrices_of(bank).items():
                grams = seen.grams[name] if is_aware and seen is not None else None
                squares = spectrum(weight, grams, ridge=self.wanted.ridge).square().sum(0).cpu()
                found[i, name] = squares / squares.sum() if squares.any() else squares
        return found

    def _budgets(self, across: str) -> list[list[Key]]:
        """The matrices that share a budget: all of them, or those of each layer."""
        if across == "model":
            return [self.keys]
        return [[key for key in self.keys if key[0] == i] for i in self.positions]

    def _cost(self, key: Key) -> int:
        fact, layer = self.facts[key[0]], self.layers[key[0]]
        return rank_cost(layer.num_groups, *fact.matrices[key[1]], fact.bytes_per_param)

    def _budget(self, keys: Sequence[Key]) -> int:
        """Bytes for all U and V of these matrices: what their rows of S take is set aside."""
        assert self.wanted.size is not None
        total = 0.0
        for i, name in keys:
            fact, G = self.facts[i], self.layers[i].num_groups
            out, width = fact.matrices[name]
            row = width * fact.bytes_per_param
            total += G * out * (self.wanted.size * row - self.wanted.keep * (row + ROW_ID_BYTES))
        return int(total)

    def _output_energy(self, position: int) -> float:
        """Mean square of what a layer's chosen experts say to a token: what losses are held to."""
        stats = self.stats[self.layers[position].name]
        return float(stats.output_square.sum()) / stats.num_tokens or 1.0
