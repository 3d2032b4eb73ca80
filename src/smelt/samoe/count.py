"""Parameters, FLOPs and bytes of a configuration, in closed form."""

from typing import cast

from smelt.samoe.layout import Sizes, make_layout


def num_params(config: Sizes) -> int:
    """All parameters as stored."""
    layout = make_layout(config)
    experts = sum(g.entries * g.experts * expert_params(config) for g in layout.groups)
    return _outside_experts(config) + experts


def num_active_params(config: Sizes) -> int:
    """Parameters one token meets, once per use."""
    layout = make_layout(config)
    return _outside_experts(config) + len(layout.layers) * _experts_per_token(
        config
    ) * expert_params(config)


def expert_params(config: Sizes) -> int:
    """Of one expert of one pool entry."""
    D, F = config.hidden_size, cast(int, config.moe_intermediate_size)
    biases = (1 + config.is_gated) * F + D if config.has_bias else 0
    return (2 + config.is_gated) * D * F + biases


def flops_per_token(config: Sizes, context: int = 0) -> int:
    """2 × the multiply-adds of one token's forward."""
    D, F = config.hidden_size, cast(int, config.moe_intermediate_size)
    products = config.num_hidden_layers * _attention_matrices(config)
    products += _num_dense(config) * (2 + config.is_gated) * D * cast(int, config.intermediate_size)
    for layer in make_layout(config).layers:
        products += D * layer.experts
        products += (
            _entries_run(config) * config.num_experts_per_tok * (2 + config.is_gated) * D * F
        )
    products += D * config.vocab_size
    width = config.num_attention_heads * cast(int, config.head_dim)
    return 2 * products + 4 * config.num_hidden_layers * width * context


def bytes_per_decode_step(
    config: Sizes, batch: int, context: int = 0, bytes_per_value: int = 4
) -> float:
    """Expected bytes read by one decode step of `batch` sequences."""
    D = config.hidden_size
    tables = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    positions = config.max_position_embeddings * D if config.position_embedding == "learned" else 0
    values = float(_outside_experts(config) - tables - positions)
    if config.shared_router:
        values += sum(D * layer.experts for layer in make_layout(config).layers[1:])
    values += config.vocab_size * D  # the head
    values += batch * D * (2 if positions else 1)  # a row of each table per sequence
    read = make_layout(config).groups[0].entries if make_layout(config).is_mixed else 1
    for layer in make_layout(config).layers:
        hit = distinct_experts(layer.experts, config.num_experts_per_tok, batch)
        values += hit * read * expert_params(config)
    kv = cast(int, config.num_key_value_heads) * cast(int, config.head_dim)
    values += 2 * config.num_hidden_layers * kv * context * batch
    return values * bytes_per_value


def distinct_experts(num_experts: int, num_choices: int, num_tokens: int) -> float:
    """U: how many of E experts so many tokens reach, if each chooses K of them uniformly."""
    return num_experts * (1 - (1 - num_choices / num_experts) ** num_tokens)


def _entries_run(config: Sizes) -> int:
    """Pool entries that a layer runs for each chosen expert."""
    if not make_layout(config).is_mixed or config.mix == "weight":
        return 1
    return config.pool_size


def _experts_per_token(config: Sizes) -> int:
    """Experts whose parameters one token meets in one layer."""
    entries = config.pool_size if make_layout(config).is_mixed else 1
    return entries * config.num_experts_per_tok


def _num_dense(config: Sizes) -> int:
    """Dense FFNs: blocks without experts, and those beside the experts of PR-MoE."""
    layout = make_layout(config)
    beside = len(layout.layers) if layout.has_dense_residual else 0
    return config.num_hidden_layers - len(layout.layers) + beside


def _attention_matrices(config: Sizes) -> int:
    width = config.num_attention_heads * cast(int, config.head_dim)
    kv = cast(int, config.num_key_value_heads) * cast(int, config.head_dim)
    return 2 * config.hidden_size * width + 2 * config.hidden_size * kv


def _outside_experts(config: Sizes) -> int:
    """Every parameter but the experts' own."""
    D, L = config.hidden_size, config.num_hidden_layers
    layout = make_layout(config)
    norm = (2 if config.norm == "layer" else 1) * D
    total = config.vocab_size * D * (1 if config.tie_word_embeddings else 2)
    if config.position_embedding == "learned":
        total += config.max_position_embeddings * D
    total += (2 * L + 1) * norm + L * _attention_matrices(config)
    head_dim = cast(int, config.head_dim)
    if config.has_bias:
        kv = cast(int, config.num_key_value_heads)
        total += L * ((config.num_attention_heads + 2 * kv) * head_dim + D)
    if config.qk_norm:
        total += L * 2 * (2 if config.norm == "layer" else 1) * head_dim
    inner = cast(int, config.intermediate_size)
    biases = (1 + config.is_gated) * inner + D if config.has_bias else 0
    total += _num_dense(config) * ((2 + config.is_gated) * D * inner + biases)
    routers = [layer.experts for layer in layout.layers]
    total += D * sum(routers[:1] if config.shared_router else routers)
    total += len(routers) * (int(config.use_beta) + _alpha_size(config))
    return total


def _alpha_size(config: Sizes) -> int:
    """Values of one layer's α; a frozen α is a parameter that does not train."""
    if not make_layout(config).is_mixed:
        return 0
    per_entry = {"layer": 1, "expert": config.num_experts, "matrix": 2 + config.is_gated}
    return config.pool_size * per_entry[config.alpha_scope]
