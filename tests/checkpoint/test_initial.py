"""Initial values of Switch: routers a balance loss can move, attention that matches and copies."""

import copy

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from checkpoints import tiny_config
from smelt.checkpoint.bind import find_layers
from smelt.checkpoint.initial import calm_routers, match_tokens


@pytest.fixture(scope="module")
def drawn():
    config = tiny_config(
        "switch_transformers",
        d_model=128,
        d_kv=32,
        d_ff=64,
        vocab_size=400,
        num_layers=2,
        expert_capacity=200,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


@pytest.fixture(scope="module")
def matching(drawn):
    model = copy.deepcopy(drawn)
    match_tokens(model)
    return model


def attentions(model, ids, decoder_ids):
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=decoder_ids, output_attentions=True)


IDS = torch.randperm(390, generator=torch.Generator().manual_seed(1))[None, :60] + 2


def test_logits_of_calm_routers_are_about_one_wide(drawn):
    model = copy.deepcopy(drawn)
    before = {layer.router: router(model, layer) for layer in find_layers(model)}
    calm_routers(model)
    for layer in find_layers(model):
        x = torch.randn(500, 128)
        assert (x @ router(model, layer).T).std() == pytest.approx(1.0, rel=0.2)
        assert torch.allclose(router(model, layer) * 128**0.5, before[layer.router])


def router(model, layer):
    (weight,) = model.get_submodule(layer.router).parameters()
    return weight.detach().clone()


def test_across_a_token_begins_by_attending_to_its_like(matching, drawn):
    """Half of the heads, on the first layer: of sixty different tokens, the equal one most."""
    seen = attentions(matching, IDS, IDS).cross_attentions[0][0].diagonal(dim1=-2, dim2=-1)
    assert seen[:2].mean() > 0.25
    assert seen[2:].mean() < 0.05
    assert (
        attentions(drawn, IDS, IDS).cross_attentions[0][0].diagonal(dim1=-2, dim2=-1).mean() < 0.1
    )


def test_two_heads_of_the_encoder_see_the_next_and_the_one_before(matching):
    seen = attentions(matching, IDS, IDS).encoder_attentions[0][0]
    assert seen[2].diagonal(1).mean() > 0.6
    assert seen[3].diagonal(-1).mean() > 0.6
    assert seen[:2].diagonal(dim1=-2, dim2=-1).mean() > 0.4  # a token is equal to itself


def test_a_copying_head_gives_back_what_it_reads(matching):
    attention = matching.encoder.block[0].layer[0].SelfAttention
    written = attention.o.weight @ attention.v.weight
    x = torch.randn(200, 128)
    likeness = torch.cosine_similarity(x @ written.T, x)
    assert likeness.mean() > 0.5


def test_the_decoders_own_attention_is_as_it_was_drawn(matching, drawn):
    before = dict(drawn.named_parameters())
    changed = {n for n, p in matching.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert not any(n.startswith("decoder.") and ".SelfAttention." in n for n in changed)
    assert not any(".experts." in n or "router" in n or "shared" in n for n in changed)
