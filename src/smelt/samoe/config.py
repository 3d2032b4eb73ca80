"""`SaMoEConfig`: one class for SaMoE and every control it is compared with."""

import dataclasses
import difflib
from typing import Any, Literal, cast

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from smelt.errors import RecipeError
from smelt.samoe import count
from smelt.samoe.layout import SHARING, Layout, make_layout, moe_blocks

Mix = Literal["activation", "weight", "hard"]

PRESETS: dict[str, dict[str, Any]] = {
    # GPT-style, as published: no gate, biases, every second block, top-1, capacity 1
    "paper": {
        "position_embedding": "learned",
        "norm": "layer",
        "hidden_act": "gelu",
        "is_gated": False,
        "has_bias": True,
        "qk_norm": False,
        "moe_every": 2,
        "num_experts_per_tok": 1,
        "capacity_factor": 1.0,
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
    },
    # today's decoder; freezes into Qwen3-MoE
    "modern": {
        "position_embedding": "rope",
        "norm": "rms",
        "norm_eps": 1e-6,
        "hidden_act": "silu",
        "is_gated": True,
        "has_bias": False,
        "qk_norm": True,
        "moe_every": 1,
        "num_experts_per_tok": 2,
        "capacity_factor": None,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}


FOLLOWING = ("num_key_value_heads", "head_dim", "intermediate_size", "moe_intermediate_size")
"""The sizes that follow from others where they are not given."""

COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    *FOLLOWING,
    "num_experts",
    "num_experts_per_tok",
    "pool_size",
    "moe_every",
    "max_position_embeddings",
)
"""The sizes that are whole numbers of at least 1."""

OTHER_FIELDS = {"num_labels", "rope_theta", "attn_implementation", "output_attentions"}
"""What transformers takes beside a configuration's fields."""


class SaMoEConfig(PreTrainedConfig):
    """Sizes and rules of a SaMoE model or of one of its controls.

    Letters: D hidden_size, F moe_intermediate_size, E num_experts, K num_experts_per_tok,
    P pool_size.

    Attributes:
        sharing: which layers share which experts; `smelt.samoe.layout.SHARING` lists the rules.
        mix: how a layer combines its P pool entries. "activation": it runs them all and adds their
            outputs, weighted by α; "weight": it runs one expert whose weights are the weighted sum;
            "hard": one-hot α, which is `sharing="groups"`.
        alpha_scope: α per "layer" [P], per layer and "expert" [P, E], or per layer and "matrix"
            [P, matrices] (up, gate where there is one, down).
        alpha_init: "orthogonal" (rows of a semi-orthogonal matrix at unit norm), "uniform" (1/√P)
            or "group" (one-hot by consecutive layers, with noise of 0.01).
        train_alpha: False freezes α where it begins.
        use_beta: a learned scalar β per MoE layer multiplies the residual stream.
        shared_router: one router for all MoE layers.
        capacity_factor: Q; in training an expert takes at most max(4, ⌈Q·K·T/E⌉) of the T tokens of
            a sequence, and the rest takes the shortcut. None: no limit. Evaluation has none.
        router_aux_loss_coef: of E·Σ f·p, summed over MoE layers.
        router_z_loss_coef: of the mean squared log-sum-exp of router logits, summed likewise.
        norm_topk_prob: whether the K gate weights are divided by their sum.
        moe_every: the last block of every so many has experts; the others a dense FFN.
        is_causal: False: bidirectional attention, for masked language models.

    Raises:
        RecipeError: sizes that do not fit each other.

    Source: SaMoE (ICLR 2023 submission HO2q49XYRC).
    """

    model_type = "samoe"
    # The Trainer hands the other outputs, the logits, to metrics. (Transformers' own form.)
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "dropped"]  # noqa: RUF012
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 1
    pool_size: int = 2
    moe_every: int = 2
    sharing: str = "pool"
    mix: str = "activation"
    alpha_scope: str = "layer"
    alpha_init: str = "orthogonal"
    train_alpha: bool = True
    use_beta: bool = True
    shared_router: bool = False
    capacity_factor: float | int | None = None
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.0
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    position_embedding: str = "learned"
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    is_gated: bool = False
    has_bias: bool = True
    qk_norm: bool = False
    is_causal: bool = True
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the sizes that follow from others, and check them all."""
        _check_counts(self)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        if self.rope_parameters is None and self.position_embedding == "rope":
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
        super().__post_init__(**kwargs)
        _check(self)

    @classmethod
    def from_preset(cls, preset: str, **fields: Any) -> "SaMoEConfig":
        """The configuration of a preset, "paper" or "modern", with these fields in place.

        UniPool (`sharing="union"`) chooses P times as many experts unless told otherwise: the work
        of activation mixing.
        """
        if preset not in PRESETS:
            raise RecipeError(f"preset = {preset!r}: the presets are {', '.join(PRESETS)}.")
        known = {field.name for field in dataclasses.fields(cls)} | OTHER_FIELDS
        for name in fields.keys() - known:
            near = difflib.get_close_matches(name, known, 3) or sorted(known)
            raise RecipeError(f"{name}: SaMoEConfig has no such field. Near it: {', '.join(near)}.")
        merged = PRESETS[preset] | fields
        if merged.get("sharing") == "union" and "num_experts_per_tok" not in fields:
            merged["num_experts_per_tok"] *= merged.get("pool_size", 2)
        return cls(**merged)

    @property
    def layout(self) -> Layout:
        """Which experts are stored, and which of them each MoE layer uses."""
        return make_layout(self)

    def num_params(self) -> int:
        """All parameters, as stored: tied embeddings and shared experts count once."""
        return count.num_params(self)

    def num_active_params(self) -> int:
        """Parameters that one token meets on its way, embeddings included.

        A pool entry counts once for every layer that runs it: the size of the work, not of memory.
        """
        return count.num_active_params(self)

    def flops_per_token(self, context: int = 0) -> int:
        """Multiply-adds of one token's forward, times 2, attending to `context` positions.

        Matrix products only; mixing weights (`mix="weight"`), once per step, is not in it.
        """
        return count.flops_per_token(self, context)

    def bytes_per_decode_step(
        self, batch: int, context: int = 0, bytes_per_value: int = 4
    ) -> float:
        """Expected bytes that one cached decode step of `batch` sequences reads.

        Weights once per layer that uses them, the distinct experts of uniform routing
        (U = E·(1 − (1 − K/E)^batch)), and the cache of `context` positions.
        """
        return count.bytes_per_decode_step(self, batch, context, bytes_per_value)


def _check_counts(config: SaMoEConfig) -> None:
    for name in COUNTS:
        value = getattr(config, name)
        if name in FOLLOWING and value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise RecipeError(f"{name} = {value!r}: it is a whole number of at least 1.")


def _check(config: SaMoEConfig) -> None:
    _check_names(config)
    _check_widths(config)
    if config.sharing == "dense":
        return
    num_layers = len(moe_blocks(config))
    if num_layers == 0:
        raise RecipeError(
            f"moe_every = {config.moe_every} leaves none of {config.num_hidden_layers} blocks with "
            'experts. Lower it, or set sharing to "dense".'
        )
    layout = config.layout
    fewest = min(layer.experts for layer in layout.layers)
    if not 1 <= config.num_experts_per_tok <= fewest:
        raise RecipeError(
            f"num_experts_per_tok = {config.num_experts_per_tok}: a router here chooses among "
            f"{fewest} experts, so it is between 1 and {fewest}."
        )
    is_grouped = config.sharing == "groups" or (config.sharing == "pool" and config.mix == "hard")
    if is_grouped and config.pool_size > num_layers:
        raise RecipeError(
            f"pool_size = {config.pool_size}: {num_layers} MoE layers make at most {num_layers} "
            "groups. Lower pool_size, or add layers."
        )
    if config.shared_router and len({layer.experts for layer in layout.layers}) > 1:
        raise RecipeError(
            f"shared_router: with sharing = {config.sharing!r} the layers have different numbers "
            "of experts. Give every layer a router of its own (shared_router = false)."
        )


def _check_names(config: SaMoEConfig) -> None:
    allowed = {
        "sharing": tuple(SHARING),
        "mix": ("activation", "weight", "hard"),
        "alpha_scope": ("layer", "expert", "matrix"),
        "alpha_init": ("orthogonal", "uniform", "group"),
        "position_embedding": ("learned", "rope"),
        "norm": ("layer", "rms"),
        "hidden_act": tuple(ACT2FN),
    }
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise RecipeError(
                f"{name} = {getattr(config, name)!r}: it is one of {', '.join(values)}."
            )
    if config.capacity_factor is not None and config.capacity_factor <= 0:
        raise RecipeError(
            f"capacity_factor = {config.capacity_factor}: it is above 0, or null for no limit."
        )


def _check_widths(config: SaMoEConfig) -> None:
    heads, kv_heads = config.num_attention_heads, cast(int, config.num_key_value_heads)
    if heads % kv_heads:
        raise RecipeError(
            f"num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}."
        )
    if not config.head_dim:
        raise RecipeError(
            f"hidden_size = {config.hidden_size} leaves {heads} attention heads no width. Lower "
            "num_attention_heads, or set head_dim."
        )
    if config.position_embedding == "rope":
        rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default":
            raise RecipeError(f'rope_type = {rope_type!r}: SaMoE has "default" alone.')
    if config.position_embedding == "rope" and config.head_dim % 2:
        raise RecipeError(f"head_dim = {config.head_dim}: rotary positions need an even one.")
    for name in ("hidden_size", "moe_intermediate_size"):
        width = getattr(config, name)
        if width % 8:
            below, above = max(8, width // 8 * 8), -(-width // 8) * 8
            near = f"{above}" if below == above else f"{below} and {above}"
            raise RecipeError(
                f"{name} = {width}: the grouped kernel takes multiples of 8. The nearest: {near}."
            )
