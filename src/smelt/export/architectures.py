"""What a family is in llama.cpp: its architecture's name and settings, or why it has none.

llama.cpp fixes in code what transformers reads from config.json. Each function here holds the one
against the other; a model that would compute something else there is refused, or written under
another architecture whose arithmetic is the same, and the note says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from smelt.checkpoint.bind import MoeLayer, find_layers
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError

MAX_EXPERTS = 1024
"""Experts of a layer that llama.cpp has room for, in the build that the tests run."""

_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func


@dataclass(frozen=True)
class Target:
    """A model as an architecture of llama.cpp."""

    name: str
    settings: dict[str, Any]  # without the architecture's name before each key
    interleaves_rotary: bool = False  # rotary pairs are neighbours there, halves in transformers
    shares_embedding: bool = True  # takes its head from the embedding where there is none
    zero_shared_expert: bool = False  # it has a shared expert that the model lacks
    zero_selection_bias: bool = False  # likewise a bias of the choice of experts
    notes: tuple[str, ...] = ()


@dataclass
class _Model:
    """A checkpoint's configuration, and what stands in the way of its export."""

    config: Any
    layers: list[MoeLayer]
    num_blocks: int
    num_leading_dense: int
    is_dense_elsewhere: bool
    hidden_units: int  # F
    has_output_bias: bool
    obstacles: list[str] = field(default_factory=list)

    def require(self, holds: bool, obstacle: str) -> None:
        if not holds:
            self.obstacles.append(obstacle)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.config, name, default)

    @property
    def head_dim(self) -> int:
        own = self.get("head_dim")
        return int(own or self.config.hidden_size // self.config.num_attention_heads)


def find_target(checkpoint: Checkpoint) -> Target:
    """The architecture of a checkpoint, checked against what llama.cpp computes.

    Raises:
        CheckpointError: there is none, or it would compute something else; every reason named.
    """
    kind = checkpoint.config.model_type
    if kind == "samoe":
        raise CheckpointError(
            f"{checkpoint.folder}: a SaMoE model has no GGUF architecture. Freeze it first (smelt "
            f"export {checkpoint.folder} FROZEN), then export what that makes."
        )
    if kind == "smelt_mapped":
        raise CheckpointError(
            f"{checkpoint.folder}: a mapped checkpoint has no GGUF architecture: its layers store "
            "different numbers of experts, or factored ones. Compress with --form stock."
        )
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{checkpoint.folder}: family {kind!r} has no GGUF writer in smelt. Those that have: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    model = _read(checkpoint)
    target = FAMILIES[kind](model)
    if model.obstacles:
        raise CheckpointError(
            f"{checkpoint.folder}: llama.cpp would compute another model: "
            f"{'; '.join(model.obstacles)}. Nothing was written."
        )
    return target


def _read(checkpoint: Checkpoint) -> _Model:
    layers = find_layers(checkpoint.model)
    config = checkpoint.config.get_text_config()
    blocks = [name for name in checkpoint.blocks if name]
    sparse = [blocks.index(layer.block) for layer in layers]
    down = checkpoint.state[f"{layers[0].experts}.down_proj"]
    model = _Model(
        config=config,
        layers=layers,
        num_blocks=len(blocks),
        num_leading_dense=sparse[0],
        is_dense_elsewhere=sparse != list(range(sparse[0], len(blocks))),
        hidden_units=int(down.shape[2]),
        has_output_bias=any(name.endswith("o_proj.bias") for name in checkpoint.state),
    )
    _check_common(model)
    return model


def _check_common(model: _Model) -> None:
    config = model.config
    model.require(
        config.hidden_act in ("silu", "swish"),
        f"its experts use {config.hidden_act}, and the architecture has SiLU",
    )
    model.require(
        model.layers[0].num_experts <= MAX_EXPERTS,
        f"{model.layers[0].num_experts} experts in a layer, and it has room for {MAX_EXPERTS}",
    )
    window = model.get("sliding_window") if model.get("use_sliding_window", True) else None
    model.require(
        not window or window >= config.max_position_embeddings,
        f"attention slides over {window} tokens, and the architecture looks at all",
    )
    model.require(not model.has_output_bias, "attention_bias gives o_proj a bias")
    model.require(
        not model.is_dense_elsewhere,
        "dense feed-forward layers lie between MoE layers, and it has them at the beginning only",
    )


def _common(model: _Model) -> dict[str, Any]:
    """The settings that every architecture has."""
    config, first = model.config, model.layers[0]
    return {
        "vocab_size": config.vocab_size,
        "block_count": model.num_blocks,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "expert_count": first.num_experts,
        "expert_used_count": first.top_k,
        **_rotary(model),
    }


def _rotary(model: _Model) -> dict[str, Any]:
    """How positions turn; the frequencies of transformers and llama.cpp agree in these kinds."""
    rope = dict(model.config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    share = float(rope.get("partial_rotary_factor", 1.0))
    settings: dict[str, Any] = {
        "rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
        "rope.dimension_count": int(model.head_dim * share),
    }
    if kind in ("linear", "yarn"):
        settings |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings")
        own = {"beta_fast": 32, "beta_slow": 1}
        is_usual = all(rope.get(name) in (None, usual) for name, usual in own.items())
        odd = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name)]
        model.require(
            bool(original) and is_usual and not odd and rope.get("truncate", True),
            "YaRN with settings of its own (only factor and original_max_position_embeddings go)",
        )
        settings["rope.scaling.original_context_length"] = original
    model.require(
        kind in ("default", "linear", "yarn"),
        f"rope_type {kind!r} is not one of default, linear, yarn",
    )
    return settings


def _qwen3(model: _Model) -> Target:
    """Qwen3-MoE. `qwen3moe` always divides the top-k weights by their sum, and has no dense layer.

    Any other Qwen3-MoE goes as `glm4moe`, which does the same arithmetic in the same order and
    reads both from the file. That has a shared expert and a selection bias: both become zeros.
    """
    moe = {"expert_feed_forward_length": model.hidden_units}
    if model.config.norm_topk_prob and not model.num_leading_dense:
        return Target("qwen3moe", _common(model) | moe)
    why = []
    if not model.config.norm_topk_prob:
        why.append("qwen3moe divides the top-k weights by their sum, whatever norm_topk_prob says")
    if model.num_leading_dense:
        why.append("qwen3moe has no dense layers")
    note = (
        f"{' and '.join(why)}: written as glm4moe, which computes the same; its shared expert and "
        "selection bias are zeros, which takes the place of one expert more per layer"
    )
    return Target(
        "glm4moe",
        _common(model) | moe | _glm4_routing(model, _SOFTMAX, 1, 1.0),
        zero_shared_expert=True,
        zero_selection_bias=True,
        notes=(note,),
    )


def _glm4_routing(model: _Model, gating: int, num_shared: int, scale: float) -> dict[str, Any]:
    return {
        "expert_gating_func": gating,
        "expert_shared_count": num_shared,
        "expert_weights_norm": bool(model.config.norm_topk_prob),
        "expert_weights_scale": scale,
        "leading_dense_block_count": model.num_leading_dense,
    }


def _glm4(model: _Model) -> Target:
    """GLM-4.5 and its kin."""
    config = model.config
    model.require(
        model.layers[0].n_group == 1, "routing in groups, which the architecture does not read"
    )
    routing = _glm4_routing(
        model, _SIGMOID, int(config.n_shared_experts), float(config.routed_scaling_factor)
    )
    return Target(
        "glm4moe",
        _common(model) | {"expert_feed_forward_length": model.hidden_units} | routing,
    )


def _mixtral(model: _Model) -> Target:
    """Mixtral is `llama` with experts; the top-k weights are divided by their sum in both."""
    model.require(not model.num_leading_dense, "dense layers, and llama with experts has none")
    settings = _common(model) | {"feed_forward_length": model.hidden_units}
    return Target("llama", settings, interleaves_rotary=True)


def _olmoe(model: _Model) -> Target:
    """OLMoE. Its top-k weights are never divided by their sum there."""
    config = model.config
    model.require(
        not config.norm_topk_prob,
        "norm_topk_prob is true, and olmoe never divides the top-k weights by their sum",
    )
    model.require(config.clip_qkv is None, "clip_qkv, which the architecture does not read")
    model.require(
        config.num_key_value_heads == config.num_attention_heads,
        "fewer key–value heads than heads, and the norm of its keys is as wide as the model",
    )
    model.require(
        model.head_dim * config.num_attention_heads == config.hidden_size,
        "heads whose widths do not add up to the model's",
    )
    settings = _common(model) | {"feed_forward_length": model.hidden_units}
    return Target("olmoe", settings, shares_embedding=False)


def _qwen2(model: _Model) -> Target:
    """Qwen2-MoE (Qwen1.5-MoE too). Its top-k weights are never divided by their sum there."""
    config = model.config
    model.require(
        not config.norm_topk_prob,
        "norm_topk_prob is true, and qwen2moe never divides the top-k weights by their sum",
    )
    model.require(not model.num_leading_dense, "dense layers, and qwen2moe has none")
    model.require(
        model.head_dim * config.num_attention_heads == config.hidden_size,
        "heads whose widths do not add up to the model's",
    )
    settings = _common(model) | {
        "expert_feed_forward_length": model.hidden_units,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
    }
    return Target("qwen2moe", settings, shares_embedding=False)


def _granite(model: _Model) -> Target:
    """GraniteMoE: four scales beside the usual, and a softmax over the chosen experts."""
    config = model.config
    model.require(not model.num_leading_dense, "dense layers, and granitemoe has none")
    settings = _common(model) | {
        "feed_forward_length": model.hidden_units,
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }
    return Target("granitemoe", settings, interleaves_rotary=True)


FAMILIES: dict[str, Callable[[_Model], Target]] = {
    "glm4_moe": _glm4,
    "granitemoe": _granite,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
}
"""The families that can be written, by transformers' model type."""
