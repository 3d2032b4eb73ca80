"""How alike the experts of one layer are: the tables from which groups are formed.

Every similarity is one E×E Gram, never a loop over pairs. It is symmetric, 1 on the diagonal, and
0 between an expert and one that the evidence says nothing about (a zero column): no epsilon.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from smelt.errors import PlanError
from smelt.experts import ExpertBank, apply
from smelt.plugins import find
from smelt.routing import LayerStats


@dataclass(frozen=True)
class Evidence:
    """What is known about one layer when its groups are decided."""

    stats: LayerStats
    bank: Callable[[], ExpertBank] | None = None  # reads the weights when called; None: not at hand
    router_weight: Float[Tensor, "E D"] | None = None
    seed: int = 0  # differs from layer to layer, so that random groups do too


Similarity = Callable[[Evidence], Float[Tensor, "E E"]]

_CHUNK_ELEMENTS = 1 << 24
"""Largest float32 slice of the weights that `expert_weight` holds at once (64 MB)."""


_RUN_ON = 512
"""Tokens that `gated_output` runs every expert on."""


def cosine(gram: Float[Tensor, "E E"]) -> Float[Tensor, "E E"]:
    """The cosines of E vectors from their inner products; 0 with a zero vector, 1 with itself."""
    gram = gram.double()
    norm = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    return _unit_diagonal(gram * scale[:, None] * scale)


def router_logits(evidence: Evidence) -> Float[Tensor, "E E"]:
    """Uncentred cosine of two experts' router logits over the calibration tokens.

    Source: M-SMoE, arXiv:2310.01334, section 3.1.
    """
    return cosine(_logit_gram(evidence))


def router_logits_centered(evidence: Evidence) -> Float[Tensor, "E E"]:
    """Pearson correlation of two experts' router logits; 0 for a logit that never varies.

    A logit counts as constant where its variance is below 1e-5 of its mean square: what is left
    there is the rounding of the float32 products that the Gram was added up from.
    """
    stats, gram = evidence.stats, _logit_gram(evidence).double()
    total = stats.logit_sum.double()
    centred = gram - torch.outer(total, total) / stats.num_tokens
    varies = centred.diagonal() > 1e-5 * gram.diagonal()
    return cosine(centred * varies[:, None] * varies)


def random(evidence: Evidence) -> Float[Tensor, "E E"]:
    """Random numbers in [0, 1) from the evidence's seed: the null grouping."""
    generator = torch.Generator().manual_seed(evidence.seed)
    num_experts = evidence.stats.num_experts
    draw = torch.rand(num_experts, num_experts, dtype=torch.float64, generator=generator)
    return _unit_diagonal(draw)


def expert_weight(evidence: Evidence) -> Float[Tensor, "E E"]:
    """Cosine of two experts' weights, all tensors flattened and joined.

    Hidden units are compared in stored order, as the paper does: reordering them changes this
    similarity, though it does not change the expert. Memory: one slice of the bank in float32.
    """
    if evidence.bank is None:
        raise PlanError(
            "similarity expert-weight reads the experts' weights, which are not at hand here. "
            "Plan with the checkpoint, or choose router-logits."
        )
    gram: Tensor | None = None
    for tensor in evidence.bank().tensors().values():
        flat = tensor.flatten(1)
        for part in flat.split(max(1, _CHUNK_ELEMENTS // len(flat)), dim=1):
            part32 = part.float()
            product = (part32 @ part32.T).double().cpu()
            gram = product if gram is None else gram + product
    assert gram is not None, "a bank has tensors"
    return cosine(gram)


def expert_feature(evidence: Evidence) -> Float[Tensor, "E E"]:
    """Cosine of two experts' mean outputs over the tokens routed to each; unreached: 0."""
    mean = evidence.stats.mean_output.double()
    return cosine(mean @ mean.T)


def router_weight(evidence: Evidence) -> Float[Tensor, "E E"]:
    """Cosine of two experts' router rows."""
    if evidence.router_weight is None:
        raise PlanError(
            "similarity router-weight needs a router with one row per expert, and this layer has "
            "none. Choose router-logits or expert-feature."
        )
    weight = evidence.router_weight.double()
    return cosine(weight @ weight.T)


def gradient(evidence: Evidence) -> Float[Tensor, "E E"]:
    """Cosine of two experts' gradients: all weights as stored, one stretch for each sequence.

    Gradients of one sequence are compared with those of the same sequence and the products added
    up, so that the statistics of two texts add up too. An expert without a gradient: 0.

    Source: M-SMoE, arXiv:2310.01334, Table 4. Differs from a cosine of gradients summed over the
    text first, which near a minimum of the loss is a cosine of what little is left.
    """
    gram = evidence.stats.gradient_gram
    if gram is None:
        raise PlanError(
            "similarity gradient needs gradients, and the statistics hold none. Calibrate with "
            "`smelt calibrate --gradients`."
        )
    return cosine(gram)


def gated_output(evidence: Evidence) -> Float[Tensor, "E E"]:
    """Cosine of two experts' outputs times their gates, all sampled tokens laid end to end.

    Every expert runs on up to 512 tokens of the sample, chosen or not; its gate is its share of the
    softmax over all experts. A token counts as far as both experts would be heard for it.

    Source: REAM, arXiv:2604.04356. Differs in the sample, and in the softmax for routers that score
    by a sigmoid.
    """
    if evidence.bank is None:
        raise PlanError(
            "similarity gated-output runs the experts, whose weights are not at hand here. Plan "
            "with the checkpoint, or choose expert-feature."
        )
    stats, bank = evidence.stats, evidence.bank()
    x = stats.input_sample[:_RUN_ON].to(bank.up)
    gate = stats.sample_logits[:_RUN_ON].float().softmax(1)
    outputs = torch.empty(bank.num_experts, len(x), bank.model_size)
    for expert, out in enumerate(outputs):
        torch.mul(gate[:, expert, None], apply(bank, expert, x).float().cpu(), out=out)
    gram = torch.zeros(bank.num_experts, bank.num_experts, dtype=torch.float64)
    for part in outputs.flatten(1).split(max(1, _CHUNK_ELEMENTS // bank.num_experts), dim=1):
        gram += (part @ part.T).double()
    return cosine(gram)


SIMILARITIES: dict[str, Similarity] = {
    "router-logits": router_logits,
    "router-logits-centered": router_logits_centered,
    "random": random,
    "expert-weight": expert_weight,
    "expert-feature": expert_feature,
    "router-weight": router_weight,
    "gradient": gradient,
    "gated-output": gated_output,
}


def product(parts: list[Similarity], evidence: Evidence) -> Float[Tensor, "E E"]:
    """The product of similarities, each first moved from [-1, 1] to [0, 1], moved back at the end.

    Source: M-SMoE, Table 4. Differs from a product of plain cosines, where two experts that are
    opposite in both respects would come out alike.
    """
    unit = torch.stack([(1 + part(evidence)) / 2 for part in parts])
    return 2 * unit.prod(0) - 1


def mean(parts: list[Similarity], evidence: Evidence) -> Float[Tensor, "E E"]:
    """The mean of similarities."""
    return torch.stack([part(evidence) for part in parts]).mean(0)


def find_similarity(name: str) -> Similarity:
    """The similarity of that name; `"a*b"` is the product of two (or more), `"a+b"` their mean."""
    if "+" in name:
        return partial(mean, [find_similarity(part) for part in name.split("+")])
    parts = [find(SIMILARITIES, part.strip(), "similarity") for part in name.split("*")]
    return parts[0] if len(parts) == 1 else partial(product, parts)


def _logit_gram(evidence: Evidence) -> Float[Tensor, "E E"]:
    """The Gram of the logits; an error where the router has none."""
    gram = evidence.stats.logit_gram
    if not gram.diagonal().any():
        raise PlanError(
            "the statistics of this layer hold no router logits, so router-logits cannot compare "
            "its experts. Choose expert-feature or expert-weight."
        )
    return gram


def _unit_diagonal(similarity: Float[Tensor, "E E"]) -> Float[Tensor, "E E"]:
    """The same with ones on the diagonal, clipped to [-1, 1] and exactly symmetric."""
    symmetric = ((similarity + similarity.T) / 2).clamp(-1, 1)
    symmetric.fill_diagonal_(1.0)
    return symmetric
