"""Cached decoding is the full forward, whatever is cached, padded or asked for."""

import pytest
import torch

from samoe.tiny import PRESETS, build, logits, tiny, tokens
from smelt.errors import RecipeError
from smelt.samoe.model import SaMoEForMaskedLM

VARIANTS = {
    "activation": {},
    "weight": {"mix": "weight"},  # mixes the experts that a token reaches
    "matrix": {"alpha_scope": "matrix"},
    "union": {"sharing": "union"},
    "residual": {"sharing": "residual"},
    "grouped heads": {"num_key_value_heads": 1},
    "eager": {"attn_implementation": "eager"},
}


@torch.no_grad()
def stepwise(model, ids, first, **inputs):
    """Logits of all positions: `first` at once, the others one at a time."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    cache, parts = None, []
    for start, end in [(0, first), *((t, t + 1) for t in range(first, ids.shape[1]))]:
        out = model(
            ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if positions is None else positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_is_the_full_forward(variant, preset):
    model, ids = build(tiny(preset, num_hidden_layers=2, **VARIANTS[variant])), tokens(2, 6)
    full = logits(model, ids)
    for first in (1, 4):
        torch.testing.assert_close(stepwise(model, ids, first), full, rtol=1e-4, atol=1e-4)


def padded_left(sequences):
    """Ids, mask and positions of sequences of different lengths, padded on the left."""
    T = max(map(len, sequences))
    ids, mask = torch.zeros(len(sequences), T).long(), torch.zeros(len(sequences), T).long()
    for row, sequence in enumerate(sequences):
        ids[row, T - len(sequence) :], mask[row, T - len(sequence) :] = sequence, 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_left_padding_changes_nothing(preset):
    model = build(tiny(preset, num_hidden_layers=2))
    sequences = [tokens(1, 9, seed=1)[0], tokens(1, 6, seed=2)[0], tokens(1, 2, seed=3)[0]]
    ids, mask, positions = padded_left(sequences)
    inputs = {"attention_mask": mask, "position_ids": positions}
    full = logits(model, ids, **inputs)
    cached = stepwise(model, ids, 8, **inputs)
    for row, sequence in enumerate(sequences):
        alone = logits(model, sequence[None])[0]
        for found in (full, cached):
            torch.testing.assert_close(found[row, -len(sequence) :], alone, rtol=1e-4, atol=1e-4)


def greedy(model, sequence, count):
    """The obvious loop: a full forward for every token."""
    for _ in range(count):
        following = logits(model, sequence[None], use_cache=False)[0, -1].argmax()
        sequence = torch.cat([sequence, following[None]])
    return sequence


@pytest.mark.parametrize("preset", PRESETS)
def test_generate_is_greedy_decoding_by_full_forwards(preset):
    model = build(tiny(preset, num_hidden_layers=2))
    sequences = [tokens(1, 7, seed=1)[0], tokens(1, 4, seed=2)[0]]
    ids, mask, _ = padded_left(sequences)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    for row, sequence in enumerate(sequences):
        assert torch.equal(found[row, 7 - len(sequence) :], greedy(model, sequence, 5))
    uncached = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(found, uncached)


def test_beams_are_reordered_with_their_cache():
    model, ids = build(tiny("modern", num_hidden_layers=2)), tokens(2, 5)
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **settings)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_positions_beyond_those_learned_are_a_clear_error():
    model, ids = build(tiny()), tokens(1, 33)
    message = "33 positions: this model has learned 32"
    assert logits(model, ids[:, :32]).shape == (1, 32, 32)
    with pytest.raises(RecipeError, match=message):
        model(ids)
    with torch.no_grad(), pytest.raises(RecipeError, match=message):
        model(ids[:, 32:], past_key_values=model(ids[:, :32]).past_key_values)
    with pytest.raises(RecipeError, match=message):
        model(ids[:, :4], position_ids=torch.arange(29, 33)[None])
    with pytest.raises(RecipeError, match=message):
        model.generate(ids[:, :30], max_new_tokens=8, do_sample=False, pad_token_id=0)


def test_padding_needs_no_learned_positions():
    model, sequence = build(tiny()), tokens(1, 32)[0]
    ids, mask, positions = padded_left([sequence[:20], torch.cat([sequence, sequence[:4]])])
    with pytest.raises(RecipeError, match="36 positions"):
        model(ids, attention_mask=mask, position_ids=positions)
    found = logits(model, ids[:1], attention_mask=mask[:1], position_ids=positions[:1])
    alone = logits(model, sequence[None, :20])
    torch.testing.assert_close(found[:, 16:], alone, rtol=1e-4, atol=1e-4)


def test_rotary_positions_go_on():
    assert logits(build(tiny("modern")), tokens(1, 40)).isfinite().all()


def test_training_and_masked_models_cache_nothing():
    model = build(tiny())
    assert model(tokens()).past_key_values is not None
    assert model(tokens(), use_cache=False).past_key_values is None
    assert model.train()(tokens()).past_key_values is None
    assert build(tiny(), SaMoEForMaskedLM)(tokens()).past_key_values is None


def test_only_the_logits_asked_for_are_made():
    model, ids = build(tiny()), tokens()
    full = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=3), full[:, -3:])
    picked = torch.tensor([1, 4])
    torch.testing.assert_close(logits(model, ids, logits_to_keep=picked), full[:, picked])


def test_embeddings_stand_for_ids_in_any_memory_order():
    for preset in PRESETS:
        model, ids = build(tiny(preset)), tokens()
        embedded = model.get_input_embeddings()(ids).transpose(0, 1).contiguous().transpose(0, 1)
        with torch.no_grad():
            found = model(inputs_embeds=embedded).logits
        assert torch.equal(found, logits(model, ids))
