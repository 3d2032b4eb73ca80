"""A MoE layer of SaMoE: its router, its α and β, and the experts they combine."""

import math
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.errors import RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.dispatch import capacity, choose, dispatch, largest, within_capacity
from smelt.samoe.layout import Group
from smelt.samoe.phases import mark
from smelt.samoe.pool import Alpha, ExpertPool, PoolWeights, pooled_experts


class Routed(NamedTuple):
    """What a MoE layer did: its output, its router's logits, and the share of choices dropped."""

    output: Tensor  # [B, T, D]
    logits: Tensor  # [N, E], float32
    dropped: Tensor  # scalar


class Router(nn.Module):
    """E rows of router weights; logits in float32 whatever the model's dtype."""

    def __init__(self, num_experts: int, model_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, model_size))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, E] of inputs [N, D]."""
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.float(), self.weight.float())


class SaMoELayer(nn.Module):
    """A block's experts, `f(u) = Σ_k g_k Σ_c α_c E_{c,e_k}(u)`, and β for the stream they join."""

    def __init__(self, config: SaMoEConfig, index: int) -> None:
        super().__init__()
        layout = config.layout
        mine = layout.layers[index]
        group = layout.groups[mine.group]
        self.index, self.num_experts = index, mine.experts
        self.num_choices = config.num_experts_per_tok
        self.is_normalised = config.norm_topk_prob
        self.capacity_factor = config.capacity_factor
        self.mix: Literal["activation", "weight"] = (
            "weight" if config.mix == "weight" else "activation"  # without α there is no mixing
        )
        self.alpha_scope = config.alpha_scope
        self.num_matrices = 2 + config.is_gated
        self.router = None if config.shared_router else Router(mine.experts, config.hidden_size)
        self.pool = None if group.is_shared else make_pool(config, group)
        self.alpha = _alpha(config, group) if layout.is_mixed else None
        self.beta = nn.Parameter(torch.empty(())) if config.use_beta else None
        self.kept: tuple[int, ...] | None = None  # pool entries that are run; None: all

    def forward(
        self, x: Tensor, shared: PoolWeights | None, router: Router | None, real: Tensor | None
    ) -> Routed:
        """The layer's output for normalised inputs.

        Args:
            x: [B, T, D].
            shared: the experts, where they are not the layer's own.
            router: the router, where it is not the layer's own.
            real: [B, T], False: padding, which is not routed; None: no padding.
        """
        B, T, D = x.shape
        x_ND = x.reshape(-1, D)
        logits = cast(Router, self.router or router)(x_ND)
        routing = choose(logits, self.num_choices, is_normalised=self.is_normalised)
        weight = mark(routing.weight, done="router", follows="dispatch")
        kept = self._kept_choices(routing.choice.view(B, T, -1), real)
        pairs = dispatch(routing.__class__(routing.choice, weight, None), kept, self.num_experts)
        rows = mark(x_ND[pairs.token], done="dispatch", follows="experts")
        alpha, mix, skipped = self.spread_alpha(), self.mix, self.kept
        if shared is None:
            run = cast(ExpertPool, self.pool).run
            y = run(rows, pairs.sizes, alpha, mix=mix, kept=skipped, dtype=compute_dtype(x))
        else:
            weights = shared.first_experts(self.num_experts)
            y = pooled_experts(weights, rows, pairs.sizes, alpha, mix=mix, kept=skipped)
        y = mark(y, done="experts", follows="dispatch")
        out = torch.zeros(B * T, D, dtype=x.dtype, device=x.device)
        out = out.index_add(0, pairs.token, (y * pairs.weight[:, None]).to(out.dtype))
        out = mark(out, done="dispatch", follows="other")
        return Routed(
            out.view(B, T, D), logits, self._dropped(len(pairs.token), B * T, real, x.device)
        )

    def _kept_choices(self, choice: Tensor, real: Tensor | None) -> Tensor | None:
        """Which choices fit the capacity and are of real tokens [N, K]; None: all."""
        B, T, K = choice.shape
        if self.training and self.capacity_factor is not None:
            if real is None:
                real = torch.ones(B, T, dtype=torch.bool, device=choice.device)
            limit = capacity(self.capacity_factor, K, real.sum(1), self.num_experts)
            return within_capacity(choice, real, self.num_experts, limit).reshape(-1, K)
        return None if real is None else real.reshape(-1, 1).expand(-1, K)

    def _dropped(
        self, kept: int, num_tokens: int, real: Tensor | None, device: torch.device
    ) -> Tensor:
        if real is None:
            return torch.tensor(1 - kept / (num_tokens * self.num_choices), device=device)
        return 1 - kept / (real.sum().clamp(min=1) * self.num_choices).float()

    def spread_alpha(self) -> Alpha | None:
        """α as one factor per matrix, expert and entry."""
        if self.alpha is None:
            return None
        if self.alpha_scope == "matrix":  # [P, M], M in the order up, gate, down
            up, *gate, down = self.alpha.T[:, None, :].expand(-1, self.num_experts, -1)
            return Alpha(up, gate[0] if gate else None, down)
        spread = self.alpha.T if self.alpha_scope == "expert" else self.alpha[None]
        spread = spread.expand(self.num_experts, -1)
        inner = spread if self.mix == "weight" else None
        return Alpha(inner, inner, spread)

    def skip_entries(self, threshold: float) -> None:
        """Run only the pool entries whose largest |α| reaches the threshold (0: all of them).

        Raises:
            RecipeError: none would be left.
        """
        if self.alpha is None or threshold <= 0:
            self.kept = None
            return
        # activation mixing with α per matrix: the last column alone multiplies an entry's output
        is_last = self.alpha_scope == "matrix" and self.mix == "activation"
        factors = self.alpha[:, -1:] if is_last else self.alpha
        reach = factors.detach().abs().reshape(len(self.alpha), -1).amax(1)
        kept = (reach >= threshold).nonzero().squeeze(1).tolist()
        if not kept:
            raise RecipeError(
                f"A threshold of {threshold} empties MoE layer {self.index}: its largest |α| is "
                f"{float(reach.max()):.4g}. Choose a lower one."
            )
        self.kept = None if len(kept) == len(self.alpha) else tuple(kept)


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast computes in; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def make_pool(config: SaMoEConfig, group: Group) -> ExpertPool:
    """The parameters of one group of experts."""
    return ExpertPool(
        entries=group.entries,
        num_experts=group.experts,
        model_size=config.hidden_size,
        hidden_size=cast(int, config.moe_intermediate_size),
        is_gated=config.is_gated,
        has_bias=config.has_bias,
        hidden_act=config.hidden_act,
    )


def _alpha(config: SaMoEConfig, group: Group) -> nn.Parameter:
    shape = {
        "layer": (group.entries,),
        "expert": (group.entries, group.experts),
        "matrix": (group.entries, 2 + config.is_gated),
    }[config.alpha_scope]
    return nn.Parameter(torch.empty(shape), requires_grad=config.train_alpha)


def initial_alpha(config: SaMoEConfig) -> list[Tensor]:
    """The first α of every MoE layer, in the shape of its scope; drawn from torch's generator."""
    layers, P = len(config.layout.layers), config.pool_size
    if P == 1:
        rows = torch.ones(layers, 1)
    elif config.alpha_init == "uniform":
        rows = torch.full((layers, P), 1 / math.sqrt(P))
    elif config.alpha_init == "group":
        group = torch.arange(layers) * P // layers
        rows = functional.one_hot(group, P) + 0.01 * torch.randn(layers, P)
    else:
        rows = functional.normalize(nn.init.orthogonal_(torch.empty(layers, P)), dim=1)
    if config.alpha_scope == "expert":
        return [row[:, None].expand(-1, config.num_experts).clone() for row in rows]
    if config.alpha_scope == "matrix":
        inner = 1 + config.is_gated
        # activation mixing scales outputs; the factors inside the nonlinearity begin at 1
        fills = [row if config.mix == "weight" else torch.ones(P) for row in rows]
        return [
            torch.stack([*[fill] * inner, row], dim=1)
            for fill, row in zip(fills, rows, strict=True)
        ]
    return list(rows)


def balance_loss(
    logits: tuple[Tensor, ...], num_choices: int, real: Tensor | None = None
) -> Tensor:
    """Σ over layers of E · Σ_e f_e p_e: f the share of choices, p the mean probability of e.

    Every layer adds 1 when its load is even. Padding is left out.
    """
    losses: list[Tensor] = []
    for layer in logits:
        rows = layer if real is None else layer[real.flatten()]
        probability = rows.float().softmax(-1)
        chosen = largest(probability, num_choices).flatten()
        share = torch.bincount(chosen, minlength=layer.shape[-1]) / len(chosen)
        losses.append(layer.shape[-1] * (share * probability.mean(0)).sum())
    return torch.stack(losses).sum()


def z_loss(logits: tuple[Tensor, ...], real: Tensor | None = None) -> Tensor:
    """Σ over layers of the mean squared log-sum-exp. Padding is left out.

    Source: ST-MoE, arXiv:2202.08906, Eq. 5.
    """
    kept = [layer if real is None else layer[real.flatten()] for layer in logits]
    return torch.stack([layer.float().logsumexp(-1).square().mean() for layer in kept]).sum()
