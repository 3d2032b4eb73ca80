"""The obvious, slow SaMoE: loops over layers, tokens, choices and pool entries.

It knows a model by its configuration's plain fields and by its parameters' names, and no code of
smelt.samoe. Gradients flow to whatever parameters it is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Params = Mapping[str, Tensor]
ACTIVATIONS = {"gelu": functional.gelu, "silu": functional.silu}


# --- routing -------------------------------------------------------------------------------------


def best(values: Sequence[float], count: int) -> list[int]:
    """The ids of the largest values, the lower one first where two are equal."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def fitting(
    choices: list[list[list[int]]], real: list[list[bool]], num_experts: int, factor: float
) -> list[list[list[bool]]]:
    """Which choices [B][T][K] find a place: the queue of each sequence, one after another."""
    kept = [[[False] * len(token) for token in sequence] for sequence in choices]
    for b, sequence in enumerate(choices):
        num_choices, length = len(sequence[0]), sum(real[b])
        limit = max(4, ceil(factor * num_choices * length / num_experts))
        taken = [0] * num_experts
        for k in range(num_choices):
            for t, token in enumerate(sequence):
                if real[b][t] and taken[token[k]] < limit:
                    taken[token[k]] += 1
                    kept[b][t][k] = True
    return kept


# --- experts -------------------------------------------------------------------------------------


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], scale: Tensor | None
) -> Tensor:
    """One row after another."""
    experts = [e for e, size in enumerate(sizes) for _ in range(size)]
    rows = []
    for e, row in zip(experts, x, strict=True):
        matrix = weight[e] if scale is None else weight[e] * scale[e]
        rows.append(matrix @ row + (0 if bias is None else bias[e]))
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


@dataclass(frozen=True)
class Expert:
    """The matrices of one expert of one pool entry, or of several mixed."""

    up: Tensor
    down: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None


def entry(pool: Params, e: int, c: int, F: int) -> Expert:
    """Expert e of entry c, cut out of the pool's tensors."""
    units = slice(c * F, (c + 1) * F)
    bias = "up_bias" in pool
    return Expert(
        up=pool["up"][e, units],
        down=pool["down"][e][:, units],
        gate=pool["gate"][e, units] if "gate" in pool else None,
        up_bias=pool["up_bias"][e, units] if bias else None,
        gate_bias=pool["gate_bias"][e, units] if bias and "gate" in pool else None,
        down_bias=pool["down_bias"][e, c] if bias else None,
    )


def factor(config: Any, alpha: Tensor | None, matrix: str, e: int, c: int) -> Any:
    """α of one matrix of expert e in entry c."""
    if alpha is None:
        return 1.0
    if config.alpha_scope == "matrix":
        return alpha[c, {"up": 0, "gate": 1, "down": -1}[matrix]]
    if config.mix == "activation" and matrix != "down":
        return 1.0
    return alpha[c, e] if config.alpha_scope == "expert" else alpha[c]


def linear(matrix: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return matrix @ x if bias is None else matrix @ x + bias


def run(
    config: Any, expert: Expert, u: Tensor, up: Any = 1.0, gate: Any = 1.0, down: Any = 1.0
) -> Tensor:
    """One expert on one token, every matrix's output times its factor."""
    act = ACTIVATIONS[config.hidden_act]
    hidden = up * linear(expert.up, expert.up_bias, u)
    if expert.gate is None:
        hidden = act(hidden)
    else:
        hidden = act(gate * linear(expert.gate, expert.gate_bias, u)) * hidden
    return down * linear(expert.down, expert.down_bias, hidden)


def mixed_output(
    config: Any, pool: Params, alpha: Tensor | None, u: Tensor, e: int, num_entries: int
) -> Tensor:
    """Expert e of all entries on one token: outputs added, or weights added first."""
    F = config.moe_intermediate_size
    parts = [entry(pool, e, c, F) for c in range(num_entries)]
    factors = [
        {m: factor(config, alpha, m, e, c) for m in ("up", "gate", "down")}
        for c in range(num_entries)
    ]
    if config.mix != "weight" or alpha is None:
        outputs = [run(config, part, u, **f) for part, f in zip(parts, factors, strict=True)]
        return torch.stack(outputs).sum(0)
    total: dict[str, Tensor | None] = {}
    for name in ("up", "gate", "down", "up_bias", "gate_bias", "down_bias"):
        matrix = name.removesuffix("_bias")
        tensors = [getattr(part, name) for part in parts]
        total[name] = (
            None
            if tensors[0] is None
            else torch.stack([f[matrix] * t for f, t in zip(factors, tensors, strict=True)]).sum(0)
        )
    return run(config, Expert(**total), u)


def moe(
    config: Any,
    params: Params,
    u: Tensor,
    *,
    pool: Params,
    router: Tensor,
    real: list[list[bool]],
    num_entries: int,
    num_experts: int,
    is_training: bool,
) -> Tensor:
    """y [B, T, D] of one MoE layer, whose own parameters are `params`."""
    B, T, _ = u.shape
    assert len(router) == num_experts
    probability = [[(router @ u[b, t]).softmax(-1) for t in range(T)] for b in range(B)]
    choices = [
        [best(p.tolist(), config.num_experts_per_tok) for p in sequence] for sequence in probability
    ]
    kept = [[[real[b][t]] * len(choices[b][t]) for t in range(T)] for b in range(B)]
    if is_training and config.capacity_factor is not None:
        kept = fitting(choices, real, num_experts, config.capacity_factor)
    y = [[torch.zeros_like(u[0, 0]) for _ in range(T)] for _ in range(B)]
    for b in range(B):
        for t in range(T):
            gates = [probability[b][t][e] for e in choices[b][t]]
            total = torch.stack(gates).sum() if config.norm_topk_prob else 1.0
            for k, e in enumerate(choices[b][t]):
                if kept[b][t][k]:
                    out = mixed_output(config, pool, params.get("alpha"), u[b, t], e, num_entries)
                    y[b][t] = y[b][t] + gates[k] / total * out
    return torch.stack([torch.stack(row) for row in y])


# --- the rest of the model -----------------------------------------------------------------------


def under(params: Params, prefix: str) -> dict[str, Tensor]:
    """The parameters below a name."""
    return {
        n.removeprefix(f"{prefix}."): p for n, p in params.items() if n.startswith(f"{prefix}.")
    }


def norm(config: Any, params: Params, x: Tensor) -> Tensor:
    """LayerNorm, or x / rms(x)."""
    if config.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
    return x * params["weight"] + params.get("bias", torch.zeros(()))


def rotated(config: Any, x: Tensor, position: int) -> Tensor:
    """A head's vector, each pair (i, i + half) turned by its angle."""
    half = len(x) // 2
    angle = torch.tensor([position / 10_000.0 ** (i / half) for i in range(half)])
    first, second = x[:half], x[half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    )


def attention(config: Any, params: Params, x: Tensor, real: list[list[bool]]) -> Tensor:
    """Each query against the keys it may see, head by head; 0 where a query sees none."""
    B, T, _ = x.shape
    size, heads = config.head_dim, config.num_attention_heads
    shared_by = heads // config.num_key_value_heads

    def head(name: str, b: int, t: int, h: int) -> Tensor:
        projection = under(params, f"{name}_proj")
        cut = slice(h * size, (h + 1) * size)
        bias = projection["bias"][cut] if "bias" in projection else None
        value = linear(projection["weight"][cut], bias, x[b, t])
        if name != "v" and config.qk_norm:
            value = norm(config, under(params, f"{name}_norm"), value)
        if name != "v" and config.position_embedding == "rope":
            value = rotated(config, value, t)
        return value

    out = []
    for b in range(B):
        keys = [[head("k", b, t, h) for h in range(heads // shared_by)] for t in range(T)]
        values = [[head("v", b, t, h) for h in range(heads // shared_by)] for t in range(T)]
        for t in range(T):
            seen = [s for s in range(T) if real[b][s] and (s <= t or not config.is_causal)]
            parts = []
            for h in range(heads):
                query = head("q", b, t, h)
                scores = [query @ keys[s][h // shared_by] / sqrt(size) for s in seen]
                weights = torch.stack(scores).softmax(0) if seen else []
                part = torch.zeros(size)
                for weight, s in zip(weights, seen, strict=True):
                    part = part + weight * values[s][h // shared_by]
                parts.append(part)
            o = under(params, "o_proj")
            out.append(linear(o["weight"], o.get("bias"), torch.cat(parts)))
    return torch.stack(out).view(x.shape)


def dense(config: Any, params: Params, u: Tensor) -> Tensor:
    """The FFN of a block without experts."""
    matrices = {n: params.get(f"{n}_proj.weight") for n in ("up", "gate", "down")}
    biases = {f"{n}_bias": params.get(f"{n}_proj.bias") for n in ("up", "gate", "down")}
    expert = Expert(**matrices, **biases)
    return torch.stack([run(config, expert, row) for row in u.flatten(0, 1)]).view(u.shape)


def sharing(config: Any, m: int, num_layers: int) -> Any:
    """Layers of the same value use the same experts."""
    rule, half = config.sharing, num_layers // 2
    if rule == "pool" and config.mix == "hard":
        rule = "groups"
    return {
        "groups": f"group {m * config.pool_size // num_layers}",
        "bottom": "bottom" if m < half else m,
        "top": "top" if m >= half else m,
        "none": m,
        "residual": m,
    }.get(rule, "one")


def num_experts(config: Any, m: int, num_layers: int) -> int:
    """E of the router of MoE layer m."""
    if config.sharing in ("pyramid", "residual") and m < num_layers // 2:
        return config.num_experts // 2
    return config.num_experts * (config.pool_size if config.sharing == "union" else 1)


def logits(
    config: Any,
    params: Params,
    ids: Tensor,
    *,
    real: list[list[bool]] | None = None,
    is_training: bool = False,
) -> Tensor:
    """[B, T, V] of a language model with these parameters."""
    B, T = ids.shape
    real = real or [[True] * T] * B
    h = params["model.embed_tokens.weight"][ids]
    if config.position_embedding == "learned":
        h = h + params["model.embed_positions.weight"][:T]
    every = config.moe_every
    blocks = [i for i in range(config.num_hidden_layers) if (i + 1) % every == 0]
    blocks = [] if config.sharing == "dense" else blocks
    used = [sharing(config, m, len(blocks)) for m in range(len(blocks))]
    shared = [key for key in dict.fromkeys(used) if used.count(key) > 1]
    is_mixed = config.sharing == "pool" and config.mix != "hard"
    for i in range(config.num_hidden_layers):
        block = under(params, f"model.layers.{i}")
        x = norm(config, under(block, "attention_norm"), h)
        h = h + attention(config, under(block, "attention"), x, real)
        u = norm(config, under(block, "mlp_norm"), h)
        own = under(block, "mlp")
        if i not in blocks:
            h = h + dense(config, own, u)
            continue
        m = blocks.index(i)
        place = f"model.pools.{shared.index(used[m])}" if used[m] in shared else None
        y = moe(
            config,
            own,
            u,
            pool=under(params, place) if place else under(own, "pool"),
            router=params.get("model.router.weight", own.get("router.weight")),
            real=real,
            num_entries=config.pool_size if is_mixed else 1,
            num_experts=num_experts(config, m, len(blocks)),
            is_training=is_training,
        )
        if config.sharing == "residual":
            y = y + dense(config, under(block, "residual"), u)
        h = own.get("beta", torch.ones(())) * h + y
    h = norm(config, under(params, "model.norm"), h)
    return h @ params["lm_head.weight"].T
