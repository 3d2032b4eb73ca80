"""What cannot be read off transformers' modules: a few names, as data that tests hold true."""

COUNT_FIELDS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
"""Configuration fields that say how many experts a layer has; aliases resolve to one of them."""

TOP_K_FIELDS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")
"""Configuration fields that say how many experts a token uses."""

SCORE_FIELDS = ("scoring_func", "moe_router_activation", "expert_selection_fn")
"""Configuration fields that name how a router turns logits into scores."""

SIGMOID = frozenset({"afmoe", "flint", "hy_v3", "lfm2_moe", "minimax_m2"})
"""Families with sigmoid scores that no field and no selection bias of the router gives away."""

MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Fields that count multi-token-prediction layers; set to 0 when those layers are dropped."""

NOT_COVERED = {
    "dbrx": "its experts lie flat in one matrix",
    "diffusion_gemma": "its encoder and decoder share their experts",
    "doge": "its experts are product-key embeddings",
    "ernie4_5_vl_moe": "half of its experts see only images, and smelt calibrates on text",
    "jetmoe": "its attention has experts too",
    "llama4": "its router scales the expert's input",
    "llama4_text": "its router scales the expert's input",
    "longcat_flash": "it has identity experts that cannot merge",
    "nllb-moe": "its experts have layouts of their own",
    "qwen3_omni_moe": "the whole of it has no forward; its thinker can be compressed on its own",
    "step3p7": "its experts lie outside the common contract",
}
"""Families with experts that smelt does not read yet, by model type, and why."""
