"""What a SaMoE model becomes in a stock family: its configuration, its experts, its stream.

What layers share is written out for each of them. α goes into the experts. β goes into all that is
written to the residual stream later: the frozen stream is the original's divided by the product of
the β so far, and a norm sees no difference but its ε (and the sign).
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

from smelt.errors import PlanError
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.pool import Alpha, PoolWeights, mixed

SMALLEST_PRODUCT = 1e-4
"""|∏β| below this is refused: the frozen stream would be 10 000 times the original's."""

_SAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
    "num_key_value_heads hidden_act max_position_embeddings initializer_range use_cache "
    "tie_word_embeddings attention_dropout moe_intermediate_size num_experts norm_topk_prob "
    "num_experts_per_tok output_router_logits router_aux_loss_coef pad_token_id bos_token_id "
    "eos_token_id"
).split()
"""Fields that mean the same in both configurations."""


def frozen_config(config: SaMoEConfig) -> SaMoEConfig:
    """The same model with nothing shared and nothing left to combine: what an export writes.

    Its `num_params()` is the size of the export, for every sharing rule that gives all layers as
    many experts; for settings that no stock family has, such as the paper's, too.
    """
    layout, frozen = config.layout, copy.deepcopy(config)
    if layout.layers:
        frozen.num_experts = layout.layers[0].experts
    if layout.is_mixed and config.mix == "activation":
        frozen.moe_intermediate_size = cast(int, config.moe_intermediate_size) * config.pool_size
    frozen.sharing, frozen.use_beta, frozen.shared_router = "none", False, False
    return frozen


def check_expressible(config: SaMoEConfig, architectures: Sequence[str], *, where: str) -> None:
    """Raise PlanError, naming every setting that Qwen3-MoE has no place for.

    Capacity is no obstacle: it acts in training only. A threshold that skips pool entries is none
    either: it belongs to a model in memory, and no checkpoint holds it.
    """
    layout = config.layout
    counts = sorted({layer.experts for layer in layout.layers})
    kinds = [name for name in architectures if name != "SaMoEForCausalLM"]
    sharing = f"sharing = {config.sharing!r}"
    obstacles = (
        (kinds, f"architectures = {kinds}", "it predicts the next token"),
        (not config.is_causal, "is_causal = false", "its attention is causal: no masked LM"),
        (not counts, sharing, "a model without experts is no mixture"),
        (layout.has_dense_residual, sharing, "it has no dense FFN beside its experts"),
        (len(counts) > 1, sharing, f"layers of {counts} experts; its layers all have as many"),
        (
            config.position_embedding != "rope",
            f"position_embedding = {config.position_embedding!r}",
            "its positions are rotary",
        ),
        (config.norm != "rms", f"norm = {config.norm!r}", "its norms are RMSNorm"),
        (not config.is_gated, "is_gated = false", "its experts are gated"),
        (config.has_bias, "has_bias = true", "its projections and experts have no biases"),
        (not config.qk_norm, "qk_norm = false", "it normalises every query and key"),
    )
    found = [f"{name} ({why})" for is_obstacle, name, why in obstacles if is_obstacle]
    if found:
        raise PlanError(
            f"{where}: cannot be exported: qwen3_moe has no place for {'; '.join(found)}. A model "
            "meant for export is trained from the preset modern, with one of the sharing rules "
            "pool, none, all, groups, bottom, top, union."
        )


def stream_products(betas: Sequence[float | None]) -> list[float]:
    """∏β before each block and after the last one: by how much the frozen stream is divided.

    Args:
        betas: of each block; None: it has none.

    Raises:
        PlanError: a product near zero, or no number.
    """
    products = [1.0]
    for block, beta in enumerate(betas):
        if beta is None:
            products.append(products[-1])
            continue
        products.append(products[-1] * beta)
        if not math.isfinite(products[-1]) or abs(products[-1]) < SMALLEST_PRODUCT:
            raise PlanError(
                f"β of block {block} is {beta:.3g}, and the product of all β up to it "
                f"{products[-1]:.3g}. Freezing divides by that product, so its size must be at "
                f"least {SMALLEST_PRODUCT:g}: this model cannot be exported. Take a checkpoint of "
                "an earlier step, or train with use_beta = false."
            )
    return products


def freeze_experts(
    weights: PoolWeights,
    alpha: Alpha | None,
    *,
    mix: Literal["activation", "weight"],
    divisor: float = 1.0,
) -> PoolWeights:
    """E experts that do what a layer does with P entries of E, its output divided by `divisor`.

    Activation mixing gives experts of P·F hidden units, those of all entries side by side, and
    weight mixing experts of F. Biases, for which no target has a place, are left out.
    """
    if alpha is not None and mix == "weight":
        weights, alpha = mixed(weights, alpha, tuple(range(weights.entries))), None
    F, dtype = weights.hidden_size, weights.up.dtype
    up, gate, down = weights.up, weights.gate, weights.down

    def spread(factor: Tensor) -> Tensor:  # [E, P] → [E, P·F]
        return factor.repeat_interleave(F, dim=1).to(dtype)

    if alpha is not None:
        down = down * spread(alpha.down / divisor)[:, None, :]
        if alpha.up is not None:
            up = up * spread(alpha.up)[:, :, None]
        if gate is not None and alpha.gate is not None:
            gate = gate * spread(alpha.gate)[:, :, None]
    elif divisor != 1:
        down = down / divisor
    return replace(
        weights,
        up=up,
        gate=gate,
        down=down,
        up_bias=None,
        gate_bias=None,
        down_bias=None,
        entries=1,
    )


def stock_config(config: SaMoEConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the export."""
    after = frozen_config(config)
    rope_theta = float((after.rope_parameters or {}).get("rope_theta", 10_000.0))
    stock = Qwen3MoeConfig(
        **{name: getattr(after, name) for name in _SAME},
        rms_norm_eps=after.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        decoder_sparse_step=after.moe_every,
        mlp_only_layers=[],
    )
    stock.architectures, stock.dtype = ["Qwen3MoeForCausalLM"], dtype
    # Also under the names of the published checkpoints, which readers before transformers 5 know.
    own = {"num_experts": after.num_experts, "rope_theta": rope_theta}
    return dict(sorted((json.loads(stock.to_json_string()) | own).items()))
