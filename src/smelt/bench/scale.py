"""Training on many GPUs by formula: bytes that each one holds, and bytes that it sends.

For `precision: bfloat16` as `smelt.train.distributed` divides a model: float32 weights, gradients
and moments in equal parts; attention, dense FFNs and experts are gathered in bfloat16, all else in
float32; gradients are reduced in float32. Attention is a flash kernel; dropless or not, every
choice has its row. What a kernel needs for itself (a few hundred MB of workspace, the allocator's
slack) is not in it.

Letters: N tokens of a micro-batch on one GPU, K choices, R = K·N rows, P pool entries, E experts,
F hidden units, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import cast

from smelt.samoe import count
from smelt.samoe.config import SaMoEConfig

_LOW, _FLOAT = 2, 4  # bytes of a value


@dataclass(frozen=True)
class PerGPU:
    """Bytes on one GPU; not all of them are there at once: the peak is below their sum."""

    weights: int  # this GPU's part, float32
    gradients: int
    adam: int  # both moments
    gathered: int  # whole weights in use: what all layers share, and two blocks
    whole_gradients: int  # of what all layers share, and the buffer that they are reduced from
    activations: int  # what autograd keeps, with the logits' copies
    peak: int


@dataclass(frozen=True)
class _Sizes:
    """Parameters by how they travel: `low` in bfloat16, `light` in float32."""

    shared_low: int  # the experts that several layers share
    shared_light: int  # embeddings, the last norm, the head, a shared router
    block_low: tuple[int, ...]
    block_light: tuple[int, ...]

    def blocks(self) -> list[int]:
        """Bytes of every block as it arrives."""
        pairs = zip(self.block_low, self.block_light, strict=True)
        return [_LOW * low + _FLOAT * light for low, light in pairs]


def per_gpu(
    config: SaMoEConfig, num_gpus: int, num_tokens: int, *, is_recomputed: bool = False
) -> PerGPU:
    """The memory of one GPU of many.

    Args:
        config: of the model.
        num_gpus: among which it is divided.
        num_tokens: of a micro-batch on one GPU, in whole sequences.
        is_recomputed: gradient checkpointing: a block keeps its input only.
    """
    sizes = _sizes(config)
    part = -(-config.num_params() // num_gpus)
    shared = _LOW * sizes.shared_low + _FLOAT * sizes.shared_light
    gathered = shared + sum(sorted(sizes.blocks())[-2:])  # one in use, the next on its way
    # gradients have the dtype that the weights arrived in; they are reduced from a float32 buffer
    of_block = max(sizes.blocks()) + _FLOAT * max(sizes.block_low)
    of_shared = shared + _FLOAT * sizes.shared_low
    moments = _moments(config, num_gpus, num_tokens, is_recomputed=is_recomputed)
    return PerGPU(
        weights=_FLOAT * part,
        gradients=_FLOAT * part,
        adam=2 * _FLOAT * part,
        gathered=gathered,
        whole_gradients=max(of_shared, shared + of_block),
        activations=activations(config, num_tokens, is_recomputed=is_recomputed),
        peak=3 * _FLOAT * part + max([*moments, _FLOAT * part + of_shared]),
    )


def _moments(
    config: SaMoEConfig, num_gpus: int, num_tokens: int, *, is_recomputed: bool
) -> list[int]:
    """Bytes beside weights and Adam: when the backward begins, then in each block that it is in."""
    sizes, layout, N = _sizes(config), config.layout, num_tokens
    full = [_block(config, index, N) for index in range(config.num_hidden_layers)]
    kept = [_FLOAT * N * config.hidden_size] * len(full) if is_recomputed else full
    blocks, light = sizes.blocks(), _FLOAT * sizes.shared_light
    shared = _LOW * sizes.shared_low + light
    head = _LOW * config.vocab_size * config.hidden_size  # autocast's copy of its weight
    routers = _FLOAT * N * sum(layer.experts for layer in layout.layers)
    found = [shared + head + max(blocks) + sum(kept) + routers * is_recomputed + _end(config, N)]
    matrix = config.hidden_size * cast(int, config.moe_intermediate_size)
    done = 0
    for index in reversed(range(len(blocks))):
        low = sizes.block_low[index]
        values = shared + blocks[index] + blocks[max(index - 1, 0)] + sum(kept[:index])
        values += full[index] + light + blocks[index] + _FLOAT * low + done
        for group in (group for group in layout.groups if group.is_shared):
            passed = [layer for layer in group.layers if layout.layers[layer].block >= index]
            if passed:
                experts = group.entries * group.experts
                values += _LOW * experts * count.expert_params(config)
                # a layer's own gradient of a matrix, before it is added to the others'
                values += _LOW * experts * matrix * (len(passed) > 1)
        found.append(values)
        done += _FLOAT * (low + sizes.block_light[index]) // num_gpus
    return found


def sent_per_step(config: SaMoEConfig, num_gpus: int, *, accumulate: int = 1) -> int:
    """Bytes that one GPU sends in a step (and as many that it receives), by ring algorithms.

    What all layers share is gathered once and reduced once for each micro-batch; a block is
    gathered for the forward, gathered for the backward, and reduced.
    """
    sizes = _sizes(config)
    low, light = sum(sizes.block_low), sum(sizes.block_light)
    gathered = _LOW * (sizes.shared_low + 2 * low) + _FLOAT * (sizes.shared_light + 2 * light)
    return accumulate * (gathered + _FLOAT * config.num_params()) * (num_gpus - 1) // num_gpus


def values_sent(config: SaMoEConfig) -> tuple[int, int]:
    """Parameters gathered and gradients reduced for one micro-batch, however wide they travel."""
    sizes = _sizes(config)
    return config.num_params() + sum(sizes.block_low) + sum(sizes.block_light), config.num_params()


def activations(config: SaMoEConfig, num_tokens: int, *, is_recomputed: bool = False) -> int:
    """Bytes that autograd keeps of one micro-batch, and the copies of its logits."""
    N, D = num_tokens, config.hidden_size
    blocks = [_block(config, index, N) for index in range(config.num_hidden_layers)]
    if is_recomputed:  # the input of every block; of one block all the rest
        routers = [layer.experts for layer in config.layout.layers]
        blocks = [_FLOAT * N * D] * len(blocks) + [_FLOAT * N * sum(routers), max(blocks)]
    return sum(blocks) + _end(config, N)


def _end(config: SaMoEConfig, N: int) -> int:
    """The last norm, the head's input; logits in bfloat16 and, twice, in float32."""
    logits = config.vocab_size * (_LOW + 2 * _FLOAT)
    return N * (_norm(config) + _LOW * config.hidden_size + logits)


def _sizes(config: SaMoEConfig) -> _Sizes:
    layout, one = config.layout, count.expert_params(config)
    attention, dense = _attention_params(config), _dense_params(config)
    low, light = [], []
    norms = 2 * (2 if config.norm == "layer" else 1) * config.hidden_size
    layers = {layer.block: layer for layer in layout.layers}
    alpha = count._alpha_size(config)
    for index in range(config.num_hidden_layers):
        layer = layers.get(index)
        heavy, rest = attention, norms
        if layer is None or layout.has_dense_residual:
            heavy += dense
        if layer is not None:
            group = layout.groups[layer.group]
            heavy += 0 if group.is_shared else group.entries * group.experts * one
            rest += 0 if config.shared_router else config.hidden_size * layer.experts
            rest += alpha + int(config.use_beta)
        low.append(heavy)
        light.append(rest)
    shared = sum(group.entries * group.experts * one for group in layout.groups if group.is_shared)
    left = config.num_params() - shared - sum(low) - sum(light)
    return _Sizes(shared, left, tuple(low), tuple(light))


def _attention_params(config: SaMoEConfig) -> int:
    D, size = config.hidden_size, cast(int, config.head_dim)
    heads, kv_heads = config.num_attention_heads, cast(int, config.num_key_value_heads)
    params = 2 * D * (heads + kv_heads) * size
    if config.has_bias:
        params += (heads + 2 * kv_heads) * size + D
    norm = (2 if config.norm == "layer" else 1) * size
    return params + (2 * norm if config.qk_norm else 0)


def _dense_params(config: SaMoEConfig) -> int:
    D, inner = config.hidden_size, cast(int, config.intermediate_size)
    biases = (1 + config.is_gated) * inner + D if config.has_bias else 0
    return (2 + config.is_gated) * D * inner + biases


def _block(config: SaMoEConfig, index: int, N: int) -> int:
    """Bytes kept of one block under autocast."""
    D, size, layout = config.hidden_size, cast(int, config.head_dim), config.layout
    heads, kv_heads = config.num_attention_heads, cast(int, config.num_key_value_heads)
    # a cast copy of the input for each of three projections; queries, keys, values, output, sums
    each = 3 * _LOW * D + _LOW * 2 * (heads + kv_heads) * size + _FLOAT * heads
    if config.qk_norm:
        each += (heads + kv_heads) * ((_FLOAT + _LOW) * size + _FLOAT)
    values = N * (each + 2 * _norm(config))
    layers = [layer for layer in layout.layers if layer.block == index]
    if not layers or layout.has_dense_residual:
        hidden = (4 if config.is_gated else 2) * cast(int, config.intermediate_size)
        values += N * _LOW * ((1 + config.is_gated) * D + hidden)
    for layer in layers:
        values += N * (_FLOAT * D + 2 * _FLOAT * layer.experts)  # router: input, probabilities
        values += config.num_experts_per_tok * N * _row(config)
        if layout.is_mixed and config.mix == "weight":  # what was mixed, the down matrices' copy
            matrix = config.pool_size * D * cast(int, config.moe_intermediate_size)
            values += _LOW * layer.experts * (count.expert_params(config) + matrix)
    return values


def _norm(config: SaMoEConfig) -> int:
    """Bytes a token: what a norm of the stream keeps."""
    D = config.hidden_size
    return _FLOAT * (D + 2) if config.norm == "layer" else _FLOAT * (2 * D + 1)


def _row(config: SaMoEConfig) -> int:
    """Bytes that the experts keep of one row."""
    D, F, layout = config.hidden_size, cast(int, config.moe_intermediate_size), config.layout
    tensors, width = (4 if config.is_gated else 2), F  # into and out of each elementwise step
    if layout.is_mixed and config.mix == "activation":
        width = config.pool_size * F
        tensors += 2  # scaled by α, and the factors
        if config.alpha_scope == "matrix":
            tensors += 2 * (1 + config.is_gated)
    # rows in (a copy for each projection), out, and out times the gate weight, in float32
    values = _LOW * (1 + config.is_gated) * D + _LOW * D + _FLOAT * D
    return values + _LOW * tensors * width + 40  # ids


# --- the paper's models --------------------------------------------------------------------------

PAPER = {
    f"{kind} {name}": SaMoEConfig.from_preset(
        "paper",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_experts=experts,
        pool_size=2,
        sharing=sharing,
    )
    for name, width, layers, heads, experts in (
        ("125M-64E", 768, 12, 12, 64),
        ("350M-128E", 1024, 24, 16, 128),
        ("760M-128E", 1536, 24, 16, 128),
    )
    for kind, sharing in (("AR-MoE", "none"), ("SaMoE", "pool"))
}
"""The published rows; SaMoE with P = 2."""

GPUS = (8, 64, 128)
TOKENS = 4 * 2048  # a micro-batch of four sequences


def memory_table() -> list[str]:
    """Gigabytes per GPU of the paper's models, as lines of Markdown."""
    names = (
        "model, params, GPUs, weights + gradients + Adam, gathered, whole gradients, activations, "
        "peak, activations recomputed, peak recomputed"
    ).split(", ")
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    for name, config in PAPER.items():
        for number in GPUS:
            kept = per_gpu(config, number, TOKENS)
            less = per_gpu(config, number, TOKENS, is_recomputed=True)
            parts = kept.weights + kept.gradients + kept.adam
            values = (parts, kept.gathered, kept.whole_gradients, kept.activations, kept.peak)
            cells = [f"{value / 1e9:.1f}" for value in (*values, less.activations, less.peak)]
            lines.append(
                f"| {name} | {config.num_params() / 1e9:.2f} B | {number} | {' | '.join(cells)} |"
            )
    return lines


def traffic_table() -> list[str]:
    """Gigabytes that a GPU sends in a step of one micro-batch, as lines of Markdown."""
    lines = ["| model | " + " | ".join(f"{number} GPUs" for number in GPUS) + " |"]
    lines.append("|---|" + "---:|" * len(GPUS))
    for name, config in PAPER.items():
        cells = [f"{sent_per_step(config, number) / 1e9:.1f}" for number in GPUS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
