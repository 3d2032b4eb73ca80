"""Tiny random checkpoints of real families: D 32, two or three layers, eight experts.

`tiny_config("mixtral", num_hidden_layers=3)` is a valid configuration, `random_model` a model whose
every tensor is random (biases and selection biases too, which transformers starts at zero), and
`save` puts one on disk as `save_pretrained` does. torch and transformers are imported on first use.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

NUM_EXPERTS = 8
VOCABULARY = 96

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
"""Multi-head latent attention (the deepseek families)."""
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
"""Gated delta-net layers (qwen3_next and those after it)."""

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {
        **LATENT,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "n_group": 2,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "sliding_window": 16,
    },
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "num_hidden_layers": 3,
    },
    "minimax": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "block_size": 16,
        "layer_types": ["full_attention", "linear_attention"],
    },
    "jamba": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **LINEAR,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 8,
        "expert_capacity": 64,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
}
"""What each family needs beside COMMON; every option of it that changes routing is on."""


def tiny_config(family: str, **changes: Any) -> "PreTrainedConfig":
    """A small valid configuration of a family, with these fields changed."""
    from transformers import CONFIG_MAPPING

    settings = {**COMMON, **FAMILIES[family], **changes}
    if family == "switch_transformers":
        settings = {k: v for k, v in settings.items() if k not in COMMON or k == "vocab_size"}
    return CONFIG_MAPPING[family](**settings)


def model_class_of(cls: "type[PreTrainedConfig]") -> "type[PreTrainedModel]":
    """The class with a language-model head that belongs to a configuration class."""
    import transformers as t

    autos = (t.AutoModelForCausalLM, t.AutoModelForSeq2SeqLM, t.AutoModelForImageTextToText)
    for auto in (*autos, t.AutoModelForMultimodalLM, t.AutoModel):
        if cls in auto._model_mapping:
            return auto._model_mapping[cls]
    raise KeyError(cls)


def random_model(
    config: "PreTrainedConfig", *, seed: int = 0, dtype: "torch.dtype | None" = None
) -> "PreTrainedModel":
    """A model with every parameter and float buffer that is saved drawn at random."""
    import torch

    torch.manual_seed(seed)
    model = model_class_of(type(config))(config).eval()
    randomise(model)
    return model if dtype is None else model.to(dtype)


def randomise(model: "PreTrainedModel") -> None:
    """Small noise on every parameter and saved float buffer, so that none is zero or one."""
    import torch

    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape) * 0.1)


def save(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: "torch.dtype | None" = None,
    **changes: Any,
) -> Path:
    """A tiny random checkpoint of a family in `folder`; returns the folder."""
    random_model(tiny_config(family, **changes), seed=seed, dtype=dtype).save_pretrained(folder)
    return folder


def random_inputs(config: "PreTrainedConfig", *, batch: int = 2, length: int = 24, seed: int = 0):
    """Token ids as keyword arguments of the model's forward, on both sides where there are two."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = config.get_text_config().vocab_size

    def ids() -> torch.Tensor:
        return torch.randint(3, vocabulary, (batch, length), generator=generator)

    if not config.is_encoder_decoder:
        return {"input_ids": ids()}
    return {"input_ids": ids(), "decoder_input_ids": ids()}
