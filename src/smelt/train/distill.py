"""The loss of distillation: a student's logits held against a teacher's, a few tokens at a time.

CE(target) + weight · KL(teacher ‖ student) at temperature T, with its gradient, in chunks: beside
the logits there is one more tensor of their size, their gradient, and no float32 copy of either.

Source: M-SMoE, arXiv:2310.01334, §3.1; the temperature is Hinton's, arXiv:1503.02531.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that is not predicted
CHUNK = 1 << 20  # numbers of one float32 chunk of logits: 4 MiB


@dataclass(frozen=True)
class Top:
    """What is kept of a teacher's predictions of N tokens: its k likeliest, the rest as one bucket.

    A KL taken with it is that of the k + 1 outcomes: never more than the KL over the vocabulary,
    and equal to it for k = V (log-sum inequality).
    """

    below: Float[Tensor, "N k"]  # logits minus the largest one: 0 and less
    ids: Int[Tensor, "N k"]
    log_z: Mapping[float, Float[Tensor, " N"]]  # by temperature: log Σ exp((logit − largest) / T)

    def log_probability(self, temperature: float) -> Float[Tensor, "N k"]:
        """Of the k tokens, at a temperature that is among those kept."""
        return self.below.float() / temperature - self.log_z[temperature].float()[:, None]

    def rows(self, begin: int, end: int) -> "Top":
        """The tokens from `begin` to `end`."""
        log_z = {t: value[begin:end] for t, value in self.log_z.items()}
        return Top(self.below[begin:end], self.ids[begin:end], log_z)


def top_of(
    logits: Float[Tensor, "N V"], k: int, temperatures: tuple[float, ...], dtype: torch.dtype
) -> Top:
    """The k likeliest tokens of each of N predictions, ties by the order torch gives.

    What rounding to `dtype` changes is made up for in the normaliser, so that the k probabilities
    and the rest always add up to 1 and the rest has the mass it had.
    """
    values, ids = logits.float().topk(k, -1)
    largest = values[:, :1]
    exact = values - largest
    below = exact.to(dtype)
    log_z = {}
    for t in temperatures:
        whole = ((logits.float() - largest) / t).exp().double().sum(-1)
        change = (below.double() / t).exp().sum(-1) - (exact.double() / t).exp().sum(-1)
        if k == logits.shape[-1]:  # no rest, not even that of rounding
            whole, change = (below.double() / t).exp().sum(-1), torch.zeros_like(whole)
        log_z[t] = (whole + change).log().float()
    return Top(below, ids.int(), log_z)


@dataclass(frozen=True)
class Terms:
    """The loss of N tokens, and what it is made of."""

    loss: Float[Tensor, ""]  # cross_entropy_scale · Σ CE + divergence_scale · Σ KL; has a gradient
    cross_entropy: Float[Tensor, ""]  # Σ CE over the tokens with a target, nats
    divergence: Float[Tensor, ""]  # Σ KL(teacher ‖ student) over the tokens compared, nats, at T


def distillation(
    logits: Float[Tensor, "N V"],
    target: Int[Tensor, " N"],
    teacher: Float[Tensor, "N V"] | Top | None,
    *,
    temperature: float = 1.0,
    cross_entropy_scale: float | Tensor = 1.0,
    divergence_scale: float | Tensor = 0.0,
    everywhere: bool = False,
) -> Terms:
    """Sums of cross-entropy and KL over tokens, and their weighted sum with its gradient.

    Args:
        logits: the student's.
        target: the token to be predicted, −100 where there is none.
        teacher: its logits at the same places; or what was kept of those with a target, in their
            order; or None: no KL.
        temperature: T of the KL; both sides' logits are divided by it.
        cross_entropy_scale: what Σ CE is multiplied by, e.g. 1 / number of targets.
        divergence_scale: likewise for Σ KL; λ·T² / number of targets in smelt's default.
        everywhere: compare with the teacher at all N places, padding too (the paper's code).
    """
    assert not (everywhere and isinstance(teacher, Top)), "only real tokens are kept"
    settings = _Settings(teacher, temperature, cross_entropy_scale, divergence_scale, everywhere)
    loss, cross_entropy, divergence = _Distilled.apply(logits, target, settings)  # type: ignore[no-untyped-call]
    return Terms(loss, cross_entropy, divergence)


@dataclass(frozen=True)
class _Settings:
    teacher: Tensor | Top | None
    temperature: float
    cross_entropy_scale: float | Tensor
    divergence_scale: float | Tensor
    everywhere: bool


class _Distilled(torch.autograd.Function):
    """The loss with its gradient, which is made where the loss is."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        where = torch.ones_like(target, dtype=torch.bool)
        places = (where if settings.everywhere else target != IGNORED).nonzero()[:, 0]
        size = max(1, CHUNK // logits.shape[-1])
        sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
        for begin in range(0, len(places), size):
            at = places[begin : begin + size]
            terms, slope = _chunk(logits[at].float(), target[at], at, begin, settings)
            sums += terms
            if gradient is not None:
                gradient[at] = slope.to(gradient.dtype)
        ctx.gradient = gradient
        loss = settings.cross_entropy_scale * sums[0] + settings.divergence_scale * sums[1]
        found = loss.float(), sums[0].float(), sums[1].float()
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return (None if gradient is None else gradient.mul_(gradients[0])), None, None


def _chunk(
    z: Float[Tensor, "n V"],
    target: Int[Tensor, " n"],
    at: Int[Tensor, " n"],
    begin: int,
    settings: _Settings,
) -> tuple[Float[Tensor, "2"], Float[Tensor, "n V"]]:
    """Σ CE and Σ KL of n tokens in float64, and the gradient of their weighted sum."""
    has_target = target != IGNORED
    chosen = target.clamp(min=0)[:, None]
    log_z = z.logsumexp(-1, keepdim=True)
    nats = (log_z - z.gather(-1, chosen))[:, 0] * has_target
    slope = (z - log_z).exp_()
    slope.scatter_add_(-1, chosen, -torch.ones_like(log_z))
    slope *= has_target[:, None] * settings.cross_entropy_scale
    teacher = settings.teacher
    if teacher is None:
        return torch.stack([nats.double().sum(), nats.new_zeros((), dtype=torch.float64)]), slope
    if isinstance(teacher, Top):
        part = teacher.rows(begin, begin + len(at))
        divergence, other = _to_top(z, part, settings.temperature)
    else:
        divergence, other = _to_whole(z, teacher[at].float(), settings.temperature)
    slope += other.mul_(settings.divergence_scale / settings.temperature)
    return torch.stack([nats.double().sum(), divergence.double().sum()]), slope


def _to_whole(
    z: Float[Tensor, "n V"], teacher: Float[Tensor, "n V"], temperature: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """KL over the vocabulary, and T times its gradient: q − p."""
    log_q = (z / temperature).log_softmax(-1)
    log_p = (teacher / temperature).log_softmax(-1)
    p = log_p.exp()
    # A token that the teacher rules out (p = 0) adds nothing, whatever the student says of it.
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return divergence, log_q.exp_().sub_(p)


def _to_top(
    z: Float[Tensor, "n V"], teacher: Top, temperature: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """KL over k tokens and the rest, and T times its gradient.

    The gradient is q − p at the k tokens; at all others p is what is left of it, spread as q is.
    """
    log_q = (z / temperature).log_softmax(-1)
    ids = teacher.ids.long()
    log_p_top, log_q_top = teacher.log_probability(temperature), log_q.gather(-1, ids)
    p_top = log_p_top.exp()
    divergence = (p_top * (log_p_top - log_q_top)).sum(-1)
    if ids.shape[-1] == z.shape[-1]:
        return divergence, log_q.exp_().scatter_add_(-1, ids, -p_top)
    p_rest = (1 - p_top.double().sum(-1)).clamp(min=0).float()
    log_q_rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    rest = torch.where(p_rest > 0, p_rest * (p_rest.log() - log_q_rest), 0.0)
    within = (log_q - log_q_rest[:, None]).exp_().mul_(p_rest[:, None])  # of p, as q spreads it
    slope = log_q.exp_().sub_(within)
    return divergence + rest, slope.scatter_(-1, ids, log_q_top.exp() - p_top)
