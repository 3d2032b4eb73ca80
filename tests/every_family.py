"""Every experts class that transformers knows with the common contract, and a tiny model of each.

The classes are found in the library's own sources. A tiny configuration is the family's defaults
with every size field that is known here made small; `OVERRIDES` holds what some families need.
"""

import ast
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import checkpoints
from smelt.checkpoint.families import NOT_COVERED

ROOT = Path(transformers.__file__).parent / "models"
DECORATOR = "use_experts_implementation"
HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification")

TEXT: dict[str, Any] = {
    **checkpoints.COMMON,
    **checkpoints.LATENT,
    **checkpoints.LINEAR,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "n_group": 2,
    "topk_group": 1,
    "sliding_window": 16,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_kpool": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "use_mamba_kernels": False,
    "router_hidden_size": 16,
    "vocab_size_per_layer_input": checkpoints.VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "moe_hidden_size": 32,
    "out_hidden_size": 32,
    "projector_hidden_size": 32,
    "projection_intermediate_size": 32,
}
"""Size fields of language models, by name, wherever a configuration has them."""

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 32,
    "mlp_dim": 32,
    "encoder_ffn_dim": 32,
    "moe_intermediate_size": 16,
    "depth": 1,
    "num_hidden_layers": 1,
    "encoder_layers": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 56,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "output_dim": 32,
    "output_channels": 16,
    "vocab_size": checkpoints.VOCABULARY,
    "codebook_size": 32,
    "num_embeddings": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
    "global_attn_indexes": [0],
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
    "projection_intermediate_size": 32,
}
"""Size fields of vision and audio towers."""

GEMMA: dict[str, Any] = {
    "enable_moe_block": True,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
MLP_TYPES = {"mlp_layer_types": ["dense", "sparse"]}
PIXTRAL = {**TOWER, "model_type": "pixtral"}
OVERRIDES: dict[str, dict[str, Any]] = {
    "beam": MLP_TYPES,
    "flint": {"mlp_only_layers": []},
    "deepseek_ocr2_text": MLP_TYPES,
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 32]},
    "diffusion_gemma": {"vision_config": {**TOWER, "model_type": "gemma4_vision"}},
    "diffusion_gemma_text": GEMMA,
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "gemma4_text": GEMMA,
    "glm4v_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, **MLP_TYPES},
    "inkling2_vision": {"text_hidden_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "mistral_large4": {"vision_config": PIXTRAL},
    "muse_spark_audio": {
        "num_hidden_layers": 4,
        "hidden_sizes": [16, 16, 16, 16],
        "depths": [1, 1, 1, 1],
    },
    "muse_spark_text": MLP_TYPES,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type: fields of that configuration that the generic rule gets wrong."""

NOT_WORKING = {
    "DiffusionGemmaTextExperts": NOT_COVERED["diffusion_gemma"],
    "Ernie4_5_VLMoeMoeExperts": NOT_COVERED["ernie4_5_vl_moe"],
    "Qwen3OmniMoeTalkerTextExperts": NOT_COVERED["qwen3_omni_moe"],
}
"""Classes with the contract that smelt cannot compress, and why."""

STOCK_ONLY = {"OpenAIPrivacyFilterExperts": "a token classifier: no mapped form"}
"""Classes that work in the stock and expanded forms only, and why."""


NOT_FITTED: dict[str, str] = {
    "DeepseekV4Experts": "its routers read token ids",
    "Gemma4TextExperts": "its blocks hold the experts themselves",
    "ZayaExperts": "its routers read what the router before them made",
}
"""Classes whose layers cannot be fitted (reconstruct), and why."""


@dataclass(frozen=True)
class ExpertsClass:
    """One decorated class: where it is defined."""

    family: str  # the folder in transformers.models
    module: str
    name: str

    def models(self) -> list[type[PreTrainedModel]]:
        """The classes of its module that a checkpoint may name, language models first."""
        module = importlib.import_module(f"transformers.models.{self.family}.{self.module}")
        found = [
            value
            for name, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, PreTrainedModel)
            and value.__module__ == module.__name__
            and name == value.__name__
            and name.endswith(HEADS)
            and "PreTrainedModelFor" not in name
        ]
        return sorted(found, key=lambda c: next(i for i, h in enumerate(HEADS) if h in c.__name__))


def experts_classes() -> list[ExpertsClass]:
    """Every class of transformers.models that is decorated with the experts contract."""
    found = []
    for file in sorted(ROOT.glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        if DECORATOR not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                names = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any(DECORATOR in name for name in names):
                    found.append(ExpertsClass(file.parent.name, file.stem, node.name))
    return found


def tiny_config(cls: type[PreTrainedConfig], *, is_tower: bool = False) -> PreTrainedConfig:
    """The configuration class with its known sizes small; its parts are made small alike."""
    known = set(cls.__dataclass_fields__)
    settings = {n: v for n, v in (TOWER if is_tower else TEXT).items() if n in known}
    for name, part in cls.sub_configs.items():
        if name in known and isinstance(part, type) and part.__name__ != "AutoConfig":
            settings[name] = tiny_config(part, is_tower=is_tower or not is_text(name))
    return cls(**settings | OVERRIDES.get(cls.model_type or cls.__name__, {}))


def is_text(part: str) -> bool:
    return any(word in part for word in ("text", "thinker", "talker", "decoder"))


def table(classes: list[ExpertsClass]) -> str:
    """docs/families.md: what works, class by class."""
    works = [each for each in classes if each.name not in NOT_WORKING]
    lines = [
        "# Families",
        "",
        f"transformers {transformers.__version__} has {len(classes)} experts classes with its",
        f"common contract; smelt works with {len(works)} of them. The test that says so,",
        "`tests/checkpoint/test_every_family.py`, compresses a tiny random model of each to half",
        "its experts, and writes this table with `SMELT_WRITE_TABLES=1`.",
        "Switch (`switch_transformers`) works too, with experts of its own.",
        "",
        "| family | experts class | stock | mapped | reconstruct | note |",
        "|---|---|---|---|---|---|",
    ]
    for each in classes:
        stock = "no" if each.name in NOT_WORKING else "yes"
        mapped = "no" if each.name in NOT_WORKING | STOCK_ONLY else "yes"
        fitted = "no" if each.name in NOT_WORKING | NOT_FITTED else "yes"
        note = (NOT_WORKING | STOCK_ONLY | NOT_FITTED).get(each.name, "")
        lines.append(f"| {each.family} | `{each.name}` | {stock} | {mapped} | {fitted} | {note} |")
    lines += ["", "Families outside the contract that smelt does not read, by model type:", ""]
    contract = {each.family for each in classes}
    lines += [f"- `{k}`: {why}" for k, why in NOT_COVERED.items() if k not in contract]
    return "\n".join(lines) + "\n"
