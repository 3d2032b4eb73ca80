"""What a router did: on some tokens (`Routing`), and summed over a text (`LayerStats`)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What a router chose for N tokens: ids and weights as the experts receive them."""

    choice: Int[Tensor, "N K"]
    weight: Float[Tensor, "N K"]  # multiplies the expert's output
    logits: Float[Tensor, "N E"] | None  # before softmax or sigmoid; None: not a score router


@dataclass(frozen=True)
class LayerStats:
    """Sums over the real calibration tokens of one MoE layer; float64, counts int64.

    Everything but the sample adds up: the statistics of two halves of a text, merged, are the
    statistics of the text. Shapes: E experts, D expert input width, S sampled tokens.
    """

    num_tokens: int
    count: Int[Tensor, " E"]  # how often expert e was chosen
    gate_sum: Float[Tensor, " E"]  # Σ g: the weight that multiplies the output
    gated_norm: Float[Tensor, " E"]  # Σ g·‖f‖₂ (saliency; REAP divides it by count)
    output_norm: Float[Tensor, " E"]  # Σ ‖f‖₂ (EAN)
    output_square: Float[Tensor, " E"]  # Σ ‖f‖₂²
    output_sum: Float[Tensor, "E D"]  # Σ f
    logit_sum: Float[Tensor, " E"]  # Σ h
    logit_gram: Float[Tensor, "E E"]  # Σ h hᵀ over tokens, pre-softmax
    input_sample: Float[Tensor, "S D"]  # real tokens as the experts see them, the model's dtype
    sample_logits: Float[Tensor, "S E"]
    sample_choice: Int[Tensor, "S K"]
    sample_weight: Float[Tensor, "S K"]
    input_gram: Float[Tensor, "D D"] | None = None  # Σ x xᵀ; collected on request
    gradient_gram: Float[Tensor, "E E"] | None = None  # Σ ∇ᵢ·∇ⱼ over sequences; on request

    @property
    def num_experts(self) -> int:
        return self.count.shape[0]

    @property
    def usage(self) -> Float[Tensor, " E"]:
        """count as a share of all choices; sums to 1."""
        return self.count.double() / self.count.sum().clamp(min=1)

    @property
    def saliency(self) -> Float[Tensor, " E"]:
        """Σ g·‖f‖ over routed tokens."""
        return self.gated_norm

    @property
    def mean_saliency(self) -> Float[Tensor, " E"]:
        """g·‖f‖ per routed token (REAP's score); 0 for an expert no token reached."""
        return self.gated_norm / self.count.clamp(min=1)

    @property
    def mean_output(self) -> Float[Tensor, "E D"]:
        """Mean of f over routed tokens; 0 for an expert no token reached."""
        return self.output_sum / self.count.clamp(min=1)[:, None]

    @property
    def output_var(self) -> Float[Tensor, " E"]:
        """Variance of f over routed tokens, summed over D."""
        mean_square = self.output_square / self.count.clamp(min=1)
        return (mean_square - self.mean_output.square().sum(-1)).clamp(min=0)

    def sample_groups(self, labels: Int[Tensor, " E"]) -> Int[Tensor, "S K"]:
        """The group of each sampled choice; -1 where the expert has none, or nothing was chosen."""
        found = labels[self.sample_choice.clamp(min=0)]
        return found.masked_fill(self.sample_choice < 0, -1)

    def merge(self, other: "LayerStats") -> "LayerStats":
        """The statistics of both texts together (two processes, two runs)."""

        def join(name: str) -> Any:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "input_sample" or name.startswith("sample_"):
                return torch.cat([mine, theirs])
            return None if mine is None or theirs is None else mine + theirs

        return LayerStats(**{f.name: join(f.name) for f in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as stored, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_tokens"}
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], num_tokens: int) -> "LayerStats":
        """The inverse of `tensors`."""
        return cls(num_tokens=num_tokens, **tensors)


class Accumulator:
    """Adds up the statistics of one layer, chunk by chunk; `result()` is the LayerStats.

    Products of a chunk are float32, sums across chunks float64. Nothing of size N·E·D is held.
    """

    def __init__(self, num_experts: int, model_size: int, *, with_input_gram: bool = False) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        E, D = num_experts, model_size
        self.num_tokens = 0
        self.count = torch.zeros(E, dtype=torch.int64)
        self.gate_sum, self.gated_norm = zeros(E), zeros(E)
        self.output_norm, self.output_square = zeros(E), zeros(E)
        self.output_sum = zeros(E, D)
        self.logit_sum, self.logit_gram = zeros(E), zeros(E, E)
        self.input_gram = zeros(D, D) if with_input_gram else None
        self._sample: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add_outputs(
        self,
        expert: Int[Tensor, " R"],
        weight: Float[Tensor, " R"],
        norm: Float[Tensor, " R"],
        output_sum: Float[Tensor, "E D"],
    ) -> None:
        """Add R routed (token, expert) pairs: expert id, gate weight, ‖f‖, and Σ f per expert."""
        num_experts = self.count.shape[0]
        expert = expert.cpu()
        weight, norm = weight.cpu().double(), norm.cpu().double()
        self.count += torch.bincount(expert, minlength=num_experts)[:num_experts]
        for total, value in (
            (self.gate_sum, weight),
            (self.gated_norm, weight * norm),
            (self.output_norm, norm),
            (self.output_square, norm.square()),
        ):
            total += torch.bincount(expert, weights=value, minlength=num_experts)[:num_experts]
        self.output_sum += output_sum.cpu()

    def add_routing(
        self, x: Float[Tensor, "N D"], routing: Routing, sampled: Int[Tensor, " S"]
    ) -> None:
        """Add N real tokens' logits and inputs; `sampled` are the rows that join the sample."""
        self.num_tokens += x.shape[0]
        logits = routing.logits
        if logits is not None:
            logits = logits.float()
            self.logit_sum += logits.sum(0, dtype=torch.float64).cpu()
            self.logit_gram += (logits.T @ logits).cpu()
        else:
            logits = torch.zeros(x.shape[0], self.count.shape[0], device=x.device)
        if self.input_gram is not None:
            x32 = x.float()
            self.input_gram += (x32.T @ x32).cpu()
        if sampled.numel():
            rows = (x, logits, routing.choice, routing.weight.float())
            picked = [t[sampled.to(t.device)].cpu() for t in rows]
            self._sample.append((picked[0], picked[1], picked[2], picked[3]))

    def result(self) -> LayerStats:
        """The sums so far, as a value."""
        if not self._sample:
            raise AssertionError("no sampled rows: the sample must hold at least one token")
        x, logits, choice, weight = (torch.cat(parts) for parts in zip(*self._sample, strict=True))
        return LayerStats(
            num_tokens=self.num_tokens,
            count=self.count,
            gate_sum=self.gate_sum,
            gated_norm=self.gated_norm,
            output_norm=self.output_norm,
            output_square=self.output_square,
            output_sum=self.output_sum,
            logit_sum=self.logit_sum,
            logit_gram=self.logit_gram,
            input_sample=x,
            sample_logits=logits,
            sample_choice=choice,
            sample_weight=weight,
            input_gram=self.input_gram,
        )
