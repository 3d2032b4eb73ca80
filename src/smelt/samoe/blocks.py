"""The blocks of the model: attention, norms, the dense FFN, and what joins them."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smelt.samoe.config import SaMoEConfig
from smelt.samoe.moe import Routed, Router, SaMoELayer
from smelt.samoe.phases import mark
from smelt.samoe.pool import PoolWeights


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean square in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


def make_norm(config: SaMoEConfig, size: int | None = None) -> nn.Module:
    """The configuration's norm over `size` values, D unless said."""
    size = size or config.hidden_size
    if config.norm == "rms":
        return RMSNorm(size, config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps)


class StreamLinear(nn.Linear):
    """A linear layer that writes to the residual stream: it begins smaller."""


class Rotary(nn.Module):
    """Cosines and sines of rotary positions."""

    def __init__(self, config: SaMoEConfig) -> None:
        super().__init__()
        self.size = cast(int, config.head_dim)
        self.theta = float((config.rope_parameters or {}).get("rope_theta", 10_000.0))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, T, head_dim] in x's dtype."""
        steps = torch.arange(0, self.size, 2, dtype=torch.float32, device=x.device)
        frequency = 1.0 / self.theta ** (steps / self.size)
        angle = position_ids[:, None, :, None].float() * frequency
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Multi-head attention through transformers' interface (sdpa, flash, flex, eager)."""

    def __init__(self, config: SaMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.is_causal = config.is_causal
        self.head_dim = cast(int, config.head_dim)
        heads, kv_heads = config.num_attention_heads, cast(int, config.num_key_value_heads)
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5

        D, width, bias = config.hidden_size, heads * self.head_dim, config.has_bias
        self.q_proj = nn.Linear(D, width, bias=bias)
        self.k_proj = nn.Linear(D, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(D, kv_heads * self.head_dim, bias=bias)
        self.o_proj = StreamLinear(width, D, bias=bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        positions: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The output [B, T, D] and the attention weights, where the implementation gives them."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(x).view(shape), self.k_proj(x).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        if positions is not None:
            query, key = _rotate(query, *positions), _rotate(key, *positions)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            cast(str, self.config._attn_implementation), eager_attention
        )
        dropout = float(self.config.attention_dropout) if self.training else 0.0
        out, weights = attend(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), weights


def eager_attention(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; the mask is additive."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DenseMLP(nn.Module):
    """The FFN of a block without experts, gated or not."""

    def __init__(self, config: SaMoEConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, cast(int, config.intermediate_size)
        self.up_proj = nn.Linear(D, inner, bias=config.has_bias)
        self.gate_proj = nn.Linear(D, inner, bias=config.has_bias) if config.is_gated else None
        self.down_proj = StreamLinear(inner, D, bias=config.has_bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        hidden = self.activation(self.up_proj(x) if self.gate_proj is None else self.gate_proj(x))
        if self.gate_proj is not None:
            hidden = hidden * self.up_proj(x)
        out: Tensor = self.down_proj(hidden)
        return out


class SaMoEBlock(GradientCheckpointingLayer):
    """Attention, then experts (`h' = β·h + y`) or a dense FFN (`h' = h + y`), after a norm each."""

    def __init__(self, config: SaMoEConfig, layer_idx: int, moe_index: int | None) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer_idx)
        self.mlp_norm = make_norm(config)
        is_dense = moe_index is None
        self.mlp = DenseMLP(config) if is_dense else SaMoELayer(config, cast(int, moe_index))
        has_residual = config.layout.has_dense_residual and not is_dense
        self.residual = DenseMLP(config) if has_residual else None

    def forward(
        self,
        h: Tensor,
        shared: PoolWeights | None = None,
        router: Router | None = None,
        real: Tensor | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The stream after the block, router logits, share dropped, attention weights."""
        h = mark(h, done="other", follows="attention")
        attended, weights = self.attention(
            self.attention_norm(h), positions, mask, past_key_values, **kwargs
        )
        h = mark(h + attended, done="attention", follows="dense" if self._is_dense else "router")
        u = self.mlp_norm(h)
        if isinstance(self.mlp, DenseMLP):
            h = mark(h + self.mlp(u), done="dense", follows="other")
            return h, None, None, weights
        routed: Routed = self.mlp(u, shared, router, real)
        y = routed.output
        if self.residual is not None:
            y = mark(y, done="other", follows="dense")
            y = mark(y + self.residual(u), done="dense", follows="other")
        beta = self.mlp.beta
        h = h + y if beta is None else beta.to(h.dtype) * h + y
        return h, routed.logits, routed.dropped, weights

    @property
    def _is_dense(self) -> bool:
        return isinstance(self.mlp, DenseMLP)
