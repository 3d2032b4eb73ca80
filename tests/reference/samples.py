"""Small random values to test with: banks of experts, and statistics of made-up tokens."""

import torch
from torch import Tensor

from smelt.experts import ExpertBank, apply
from smelt.routing import LayerStats

KINDS = ("gated", "ungated", "biased")


def random_bank(
    kind: str, E: int = 5, F: int = 6, D: int = 4, dtype: torch.dtype = torch.float32
) -> ExpertBank:
    """Experts of one of the three kinds there are."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    gate = None if kind == "ungated" else draw(E, F, D)
    if kind != "biased":
        return ExpertBank(up=draw(E, F, D), down=draw(E, D, F), gate=gate)
    biases = {"up_bias": draw(E, F), "gate_bias": draw(E, F), "down_bias": draw(E, D)}
    return ExpertBank(up=draw(E, F, D), down=draw(E, D, F), gate=gate, **biases)


def repeated(bank: ExpertBank, num: int) -> ExpertBank:
    """`num` copies of the bank's first expert."""
    return bank.map(lambda t: t[:1].repeat(num, *[1] * (t.dim() - 1)))


def shuffles(E: int, F: int) -> Tensor:
    """A random order of hidden units for each expert."""
    return torch.stack([torch.randperm(F) for _ in range(E)])


def outputs(bank: ExpertBank, x: Tensor) -> Tensor:
    """Every expert on every token: [E, N, D]."""
    return torch.stack([apply(bank, e, x) for e in range(bank.num_experts)])


def random_stats(
    E: int = 8, D: int = 6, N: int = 200, K: int = 2, router: Tensor | None = None
) -> LayerStats:
    """Statistics of N tokens through a softmax router and random linear experts."""
    x = torch.randn(N, D)
    weight = torch.randn(E, D) if router is None else router
    logits = x @ weight.T
    gate, choice = logits.softmax(1).topk(K)
    gate = gate / gate.sum(1, keepdim=True)
    output = torch.einsum("edc,nc->end", torch.randn(E, D, D), x).double()
    chosen = torch.zeros(N, E, dtype=torch.float64).scatter_(1, choice, 1.0)
    gates = torch.zeros(N, E, dtype=torch.float64).scatter_(1, choice, gate.double())
    norm = output.norm(dim=2).T
    gradients = torch.randn(E, 3 * E, dtype=torch.float64)
    return LayerStats(
        num_tokens=N,
        count=chosen.sum(0).long(),
        gate_sum=gates.sum(0),
        gated_norm=(gates * norm).sum(0),
        output_norm=(chosen * norm).sum(0),
        output_square=(chosen * norm.square()).sum(0),
        output_sum=torch.einsum("ne,end->ed", chosen, output),
        logit_sum=logits.double().sum(0),
        logit_gram=logits.double().T @ logits.double(),
        input_sample=x,
        sample_logits=logits,
        sample_choice=choice,
        sample_weight=gate,
        gradient_gram=gradients @ gradients.T,
    )
