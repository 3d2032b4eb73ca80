"""What a configuration says of its size, work and traffic is what the built model counts."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from samoe.tiny import PRESETS, SCOPES, SHARING, build, tiny, tokens
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM
from smelt.samoe.pool import ExpertPool

OPTIONS = (
    {},
    {"shared_router": True, "use_beta": False},
    {"tie_word_embeddings": False, "train_alpha": False},
    {"num_key_value_heads": 1, "head_dim": 24, "moe_every": 3, "num_hidden_layers": 7},
    {"is_gated": True, "has_bias": True, "qk_norm": True, "mix": "weight"},
    {"position_embedding": "rope", "norm": "layer", "mix": "hard", "pool_size": 1},
)


def on_meta(config):
    with torch.device("meta"):
        return SaMoEForCausalLM(config)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sharing", SHARING)
def test_parameters_are_those_of_the_built_model(sharing, preset):
    scopes = SCOPES if sharing == "pool" else SCOPES[:1]
    for scope, options in itertools.product(scopes, OPTIONS):
        if options.get("shared_router") and sharing in ("pyramid", "residual"):
            options = {**options, "shared_router": False}
        config = tiny(preset, sharing=sharing, alpha_scope=scope, **options)
        assert config.num_params() == sum(p.numel() for p in on_meta(config).parameters()), options


@pytest.mark.parametrize(
    ("billions", "fields"),
    [
        (1.911, {"sharing": "none"}),
        (0.702, {}),
        (13.15, {"num_hidden_layers": 24, "num_attention_heads": 16, "sharing": "none"}),
        (5.37, {"num_hidden_layers": 24, "num_attention_heads": 16}),
        (29.54, {"num_hidden_layers": 24, "num_attention_heads": 16, "sharing": "none"}),
    ],
)
def test_the_published_sizes_are_met(billions, fields):
    sizes = {1.911: (768, 64), 0.702: (768, 64), 13.15: (1024, 128)}
    width, experts = sizes.get(billions, (1536, 128))
    defaults = {"num_hidden_layers": 12, "num_attention_heads": 12, "pool_size": 2}
    config = SaMoEConfig.from_preset(
        "paper", hidden_size=width, num_experts=experts, **(defaults | fields)
    )
    assert config.num_params() == pytest.approx(billions * 1e9, rel=5e-3)
    assert config.num_params() == sum(p.numel() for p in on_meta(config).parameters())


def experts_of(model):
    """Every MoE layer with the tensors of its experts."""
    backbone = model.model
    for i, block in enumerate(backbone.layers):
        if block.mlp in backbone.moe_layers():
            index = backbone._pool_of.get(i)
            pool = block.mlp.pool if index is None else backbone.pools[index]
            yield block.mlp, list(pool.parameters())


@pytest.mark.parametrize("fields", [{}, {"mix": "weight", "num_experts_per_tok": 2}])
@pytest.mark.parametrize("sharing", SHARING)
def test_active_parameters_are_those_on_the_way_of_one_token(sharing, fields):
    config = tiny(sharing=sharing, moe_every=1, **fields)
    model = build(config)
    routed = model(tokens(1, 1), output_router_logits=True).router_logits or ()
    total = sum(p.numel() for n, p in model.named_parameters() if "pool" not in n)
    for (_, tensors), scores in zip(experts_of(model), routed, strict=True):
        for expert in scores[0].topk(config.num_experts_per_tok).indices:
            total += sum(tensor[expert].numel() for tensor in tensors)
    assert config.num_active_params() == total


FLOPS = [
    *({"sharing": sharing} for sharing in SHARING),
    {"mix": "weight"},
    {"mix": "hard"},
    {"alpha_scope": "matrix"},
    {"shared_router": True, "num_key_value_heads": 1, "head_dim": 24},
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fields", FLOPS, ids=lambda fields: " ".join(map(str, fields.values())))
def test_flops_are_those_of_the_built_model(fields, preset):
    # Of twice the sequences, less of once: what is done once a step (mixing weights) cancels.
    config = tiny(preset, attn_implementation="eager", **fields)
    model, T, counted = build(config), 8, []
    for batch in (4, 8):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(tokens(batch, T), use_cache=False)
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == config.flops_per_token(context=T) * 4 * T


def test_the_backward_does_twice_the_work_of_the_forward():
    config = tiny(attn_implementation="eager", capacity_factor=None)
    model, counted = build(config).train(), []
    for batch in (4, 8):
        with FlopCounterMode(display=False) as counter:
            model(tokens(batch, 8)).logits.sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == 3 * config.flops_per_token(context=8) * 32


class Reads:
    """Values read by a decode step: each module's parameters per call, and the cache."""

    def __init__(self, model):
        self.values = 0
        tables = (model.model.embed_tokens, model.model.embed_positions)
        for module in model.modules():
            if module in tables:
                module.register_forward_hook(self.rows)
            elif not isinstance(module, ExpertPool):
                module.register_forward_hook(self.whole)
        self.experts = dict(experts_of(model))
        for layer in self.experts:
            layer.register_forward_hook(self.expert_values)

    def rows(self, module, inputs, output):
        self.values += module.embedding_dim * 2  # one row for each of two sequences

    def whole(self, module, inputs, output):
        self.values += sum(p.numel() for p in module.parameters(recurse=False))

    def expert_values(self, layer, inputs, output):
        self.values += sum(t[: layer.num_experts].numel() for t in self.experts[layer])


@pytest.mark.parametrize(
    "fields",
    [
        *({"sharing": sharing} for sharing in ("pool", "none", "all", "dense")),
        {"sharing": "union", "num_experts_per_tok": 8},
        {"sharing": "residual", "moe_every": 4},  # one layer, of all experts
        {"sharing": "pool", "shared_router": True, "use_beta": False, "mix": "weight"},
        {"sharing": "groups", "tie_word_embeddings": False, "num_key_value_heads": 1},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
@pytest.mark.parametrize("preset", PRESETS)
def test_decode_traffic_is_what_the_built_model_reads(preset, fields):
    # Every token chooses every expert.
    config = tiny(preset, **({"moe_every": 1, "num_experts_per_tok": 4} | fields))
    model = build(config)
    with torch.no_grad():
        cache = model(tokens(2, 5)).past_key_values
        reads = Reads(model)
        context = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        model(tokens(2, 1), past_key_values=cache)
    for width in (2, 4):
        expected = width * (reads.values + context)
        assert config.bytes_per_decode_step(2, 5, bytes_per_value=width) == expected


def test_few_tokens_reach_few_experts():
    config = SaMoEConfig.from_preset("paper", num_experts=64, sharing="none")
    one = config.bytes_per_decode_step(1)
    expert = config.bytes_per_decode_step(2) - one
    # The second token reaches a new expert in 63 of 64 cases, and reads a row of each table.
    weights = 2 * 768 * 3072 + 3072 + 768
    assert expert == pytest.approx(4 * (6 * 63 / 64 * weights + 2 * 768))
    assert config.bytes_per_decode_step(10**4) - one == pytest.approx(
        4 * (6 * 63 * weights + 2 * 768 * (10**4 - 1))
    )
