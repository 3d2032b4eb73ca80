"""How much memory training a SaMoE model takes: what autograd keeps, and when it is most.

Bytes of one process in float32 with fused AdamW; no gradient checkpointing, no autocast. Weights
and the optimiser's two moments are always there. Activations are most when the backward begins, and
go as gradients come; the peak is the largest sum on that way.

Letters: N tokens of a batch, K choices, R = K·N rows of experts, P pool entries, E experts, F
hidden units, D model width, V vocabulary.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import cast

from smelt.samoe import count
from smelt.samoe.config import SaMoEConfig

_FLOAT = 4
"""Bytes of a value."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by what they hold. They are not all there at once: their sum is above the peak."""

    experts: int  # weights, gradients and two moments: 16 bytes a parameter
    others: int  # the same of all other parameters
    activations: int  # what autograd keeps of a forward
    head: int  # of that, and beside it: the logits' copies and gradients
    peak: int


def training_bytes(config: SaMoEConfig, num_tokens: int) -> int:
    """Peak bytes of a training step on a batch of so many tokens."""
    return training_memory(config, num_tokens).peak


def training_memory(config: SaMoEConfig, num_tokens: int) -> TrainingMemory:
    """The peak and its parts, where no expert's capacity drops a row and outputs are let go."""
    N = num_tokens
    blocks = [_block(config, index, N) for index in range(config.num_hidden_layers)]
    end = _stream(config, N)
    logits = N * config.vocab_size
    params, table = config.num_params(), config.vocab_size * config.hidden_size
    groups = config.layout.groups
    experts = sum(g.entries * g.experts for g in groups) * count.expert_params(config)
    fixed = 3 * params  # weights and moments
    moments = [fixed + sum(blocks) + end + 3 * logits]
    for index, kept in enumerate(accumulate(blocks)):  # while the backward is in this block
        moments.append(fixed + kept + _passing(config, index, N) + _gradients(config, index))
    # the gradient of tied embeddings is the sum of two, and all three are there for a while
    moments.append(fixed + params + (2 * table if config.tie_word_embeddings else 0))
    return TrainingMemory(
        experts=_FLOAT * 4 * experts,
        others=_FLOAT * 4 * (params - experts),
        activations=_FLOAT * (sum(blocks) + end + logits),
        head=_FLOAT * 3 * logits,
        peak=_FLOAT * max(moments),
    )


def saved_values(config: SaMoEConfig, num_tokens: int) -> int:
    """Values that autograd keeps between forward and backward, parameters not counted."""
    return training_memory(config, num_tokens).activations // _FLOAT


def _block(config: SaMoEConfig, index: int, N: int) -> int:
    """Values kept of one block: attention, then experts or a dense FFN."""
    layout = config.layout
    values = _attention(config, N) + _stream(config, N)
    layers = [layer for layer in layout.layers if layer.block == index]
    if not layers or layout.has_dense_residual:
        values += _hidden(config) * N * cast(int, config.intermediate_size)
    for layer in layers:
        R, D = config.num_experts_per_tok * N, config.hidden_size
        rows = 3 * R * D  # of input, of output, of output times gate weight
        routing = 2 * N * layer.experts + 7 * R  # probabilities, the loss's own, ids
        values += rows + routing + _hidden(config) * R * _width(config)
        values += _mixing(config, layer.experts, R) if layout.is_mixed else 0
    return values


def _mixing(config: SaMoEConfig, num_experts: int, R: int) -> int:
    """Values kept by what α multiplies."""
    width = config.pool_size * cast(int, config.moe_intermediate_size)
    if config.mix == "weight":  # the mixed weights, and the pool's down, rearranged
        rearranged = num_experts * width * config.hidden_size
        return num_experts * count.expert_params(config) + rearranged
    values = num_experts * width  # a factor per hidden unit
    if config.alpha_scope == "matrix":  # one per row and hidden unit, and what it multiplies
        values += 2 * (1 + config.is_gated) * R * width
    return values


def _stream(config: SaMoEConfig, N: int) -> int:
    """The residual stream before a norm, and what the norm keeps and gives."""
    D = config.hidden_size
    return N * D + (N * (D + 2) if config.norm == "layer" else N * (2 * D + 1))


def _attention(config: SaMoEConfig, N: int) -> int:
    """Queries, keys, values and outputs, and the stream that they come from."""
    size = cast(int, config.head_dim)
    heads, kv_heads = config.num_attention_heads, cast(int, config.num_key_value_heads)
    values = N * (2 * heads * size + 2 * kv_heads * size + heads)
    if config.qk_norm:
        is_rms = config.norm == "rms"
        values += N * (heads + kv_heads) * (2 * size + 1 if is_rms else size + 2)
    return values + _stream(config, N)


def _hidden(config: SaMoEConfig) -> int:
    """Tensors of hidden units that an expert keeps: into and out of each elementwise step."""
    return 4 if config.is_gated else 2


def _width(config: SaMoEConfig) -> int:
    """Hidden units that a row passes: P·F where activations are mixed."""
    mixed = config.layout.is_mixed and config.mix == "activation"
    return cast(int, config.moe_intermediate_size) * (config.pool_size if mixed else 1)


def _gradients(config: SaMoEConfig, index: int) -> int:
    """Values of gradients that there are once the backward has reached this block."""
    layout, one = config.layout, count.expert_params(config)
    experts = [g.entries * g.experts * one for g in layout.groups]
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    each = (config.num_params() - sum(experts) - tables) // config.num_hidden_layers
    passed = [layer for layer in layout.layers if layer.block >= index]
    used = {layer.group for layer in passed}
    values = config.vocab_size * config.hidden_size + sum(experts[group] for group in used)
    return values + each * (config.num_hidden_layers - index)


def _passing(config: SaMoEConfig, index: int, N: int) -> int:
    """Values that the backward of a block needs for a while: gradients of its activations, and,
    where a later layer has used the same experts, one more gradient to add to theirs.
    """
    layout = config.layout
    own = [layer for layer in layout.layers if layer.block == index]
    if not own:
        return N * cast(int, config.intermediate_size)
    group = layout.groups[own[0].group]
    matrix = config.hidden_size * cast(int, config.moe_intermediate_size)
    half = group.entries * group.experts * matrix  # of the experts' gradient: up, or down
    values = config.num_experts_per_tok * N * _width(config)
    if any(layer.block > index and layer.group == own[0].group for layer in layout.layers):
        values += half
    elif layout.is_mixed and config.mix == "weight":
        values -= half  # mixed weights are let go before the second half comes
    return values
