"""Settings that cannot be: one clear error each, before anything is built."""

import pytest

from samoe.tiny import SHARING, tiny
from smelt.errors import RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.layout import SHARING as RULES

BAD = {
    "no pool entry": ({"pool_size": 0}, "pool_size = 0: it is a whole number of at least 1"),
    "no experts": ({"num_experts": 0}, "num_experts = 0: it is a whole number of at least 1"),
    "negative width": ({"moe_intermediate_size": -8}, "moe_intermediate_size = -8: it is a whole"),
    "half an expert": ({"num_experts": 2.5}, "num_experts = 2.5: it is a whole number"),
    "a word for a number": ({"pool_size": "two"}, "pool_size = 'two': it is a whole number"),
    "no choice": ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0: it is a whole number"),
    "more choices than experts": (
        {"num_experts_per_tok": 5},
        "num_experts_per_tok = 5: .* 4 experts, so it is between 1 and 4",
    ),
    "more choices than a layer's experts": (
        {"num_experts_per_tok": 3, "sharing": "pyramid"},
        "num_experts_per_tok = 3: .* 2 experts",
    ),
    "odd model width": ({"hidden_size": 20}, "hidden_size = 20: .* The nearest: 16 and 24"),
    "odd expert width": (
        {"moe_intermediate_size": 30},
        "moe_intermediate_size = 30: .* multiples of 8. The nearest: 24 and 32",
    ),
    "too narrow": ({"moe_intermediate_size": 5}, "The nearest: 8"),
    "no head width": (
        {"hidden_size": 8, "num_attention_heads": 12},
        "hidden_size = 8 leaves 12 attention heads no width",
    ),
    "heads that do not divide": (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "num_key_value_heads = 3 does not divide num_attention_heads = 4",
    ),
    "odd rotary heads": (
        {"position_embedding": "rope", "head_dim": 7},
        "head_dim = 7: rotary positions need an even one",
    ),
    "another rope": (
        {"position_embedding": "rope", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_type = 'linear': SaMoE has \"default\" alone",
    ),
    "unknown sharing": ({"sharing": "some"}, "sharing = 'some': it is one of pool, none, all"),
    "unknown mix": ({"mix": "soft"}, "mix = 'soft': it is one of activation, weight, hard"),
    "unknown scope": ({"alpha_scope": "head"}, "alpha_scope = 'head': it is one of layer, expert"),
    "unknown start": ({"alpha_init": "zero"}, "alpha_init = 'zero': it is one of orthogonal"),
    "unknown norm": ({"norm": "batch"}, "norm = 'batch': it is one of layer, rms"),
    "unknown positions": ({"position_embedding": "alibi"}, "position_embedding = 'alibi': it is"),
    "unknown activation": ({"hidden_act": "gelo"}, "hidden_act = 'gelo': it is one of"),
    "more groups than layers": (
        {"sharing": "groups", "pool_size": 3},
        "pool_size = 3: 2 MoE layers make at most 2 groups",
    ),
    "more hard entries than layers": ({"mix": "hard", "pool_size": 3}, "pool_size = 3: 2 MoE"),
    "one router for unequal layers": (
        {"shared_router": True, "sharing": "residual"},
        "shared_router: with sharing = 'residual' the layers have different numbers",
    ),
    "no layer with experts": ({"moe_every": 5}, "moe_every = 5 leaves none of 4 blocks"),
    "no capacity": ({"capacity_factor": 0}, "capacity_factor = 0: it is above 0"),
    "a misspelt field": ({"num_expert": 8}, "num_expert: SaMoEConfig has no .* num_experts"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_setting_that_cannot_be_is_one_clear_error(name):
    fields, message = BAD[name]
    with pytest.raises(RecipeError, match=message) as caught:
        tiny(**fields)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(RecipeError, match="preset = 'big': the presets are paper, modern"):
        SaMoEConfig.from_preset("big")


def test_the_presets_are_as_published():
    paper, modern = SaMoEConfig.from_preset("paper"), SaMoEConfig.from_preset("modern")
    assert (paper.moe_every, paper.num_experts_per_tok, paper.capacity_factor) == (2, 1, 1.0)
    assert paper.intermediate_size == paper.moe_intermediate_size == 4 * paper.hidden_size
    assert (paper.norm, paper.hidden_act, paper.is_gated, paper.has_bias) == (
        ("layer", "gelu", False, True)
    )
    assert (paper.sharing, paper.pool_size, paper.mix) == ("pool", 2, "activation")
    assert (modern.norm, modern.hidden_act, modern.is_gated, modern.has_bias) == (
        ("rms", "silu", True, False)
    )
    assert paper.layout.layers[0].block == 1  # blocks 2, 4, … counted from one


def test_every_rule_of_sharing_is_tested():
    assert set(SHARING) == set(RULES)


def test_unipool_does_the_work_of_activation_mixing_unless_told():
    assert tiny("modern", sharing="union", pool_size=3).num_experts_per_tok == 6
    assert tiny("modern", sharing="union", num_experts_per_tok=1).num_experts_per_tok == 1


def test_a_dense_model_asks_nothing_of_experts():
    assert tiny(sharing="dense", num_experts_per_tok=9).layout.layers == ()
