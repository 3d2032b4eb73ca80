from dataclasses import replace

import pytest
import torch

from reference.compression import pairwise_cosine
from reference.samples import random_bank, random_stats
from smelt.compress import similarity as module
from smelt.compress.similarity import SIMILARITIES, Evidence, find_similarity
from smelt.errors import PlanError, RecipeError


def evidence_of(seed: int = 0, **changes: object) -> Evidence:
    stats = replace(random_stats(), **changes)
    return Evidence(
        stats=stats,
        bank=lambda: random_bank("biased", E=8, D=6),
        router_weight=torch.randn(8, 6),
        seed=seed,
    )


@pytest.mark.parametrize("name", [*SIMILARITIES, "router-logits*expert-feature"])
def test_similarity_is_symmetric_with_ones_on_the_diagonal(name: str) -> None:
    table = find_similarity(name)(evidence_of())
    assert torch.equal(table, table.T)
    assert torch.equal(table.diagonal(), torch.ones(8, dtype=table.dtype))
    assert table.abs().max() <= 1
    assert len(table.unique()) > 8


def test_router_logits_is_the_cosine_of_the_logit_columns() -> None:
    evidence = evidence_of()
    found = SIMILARITIES["router-logits"](evidence)
    expected = pairwise_cosine(evidence.stats.sample_logits.T)
    torch.testing.assert_close(found, expected)


def test_centered_router_logits_is_the_correlation_of_the_logit_columns() -> None:
    logits = torch.randn(200, 8) + torch.arange(8)  # means that an uncentred cosine would see
    gram = logits.double().T @ logits.double()
    evidence = evidence_of(logit_gram=gram, logit_sum=logits.double().sum(0))
    found = SIMILARITIES["router-logits-centered"](evidence)
    torch.testing.assert_close(found, torch.corrcoef(logits.double().T))


def test_a_logit_that_never_varies_correlates_with_nothing() -> None:
    logits = torch.randn(200, 8)
    logits[:, 3] = 2.7
    gram = (logits.T @ logits).double()  # float32 products, as calibration adds them up
    evidence = evidence_of(logit_gram=gram, logit_sum=logits.double().sum(0))
    found = SIMILARITIES["router-logits-centered"](evidence)
    assert torch.equal(found[3], torch.eye(8, dtype=torch.float64)[3])


def test_the_scale_of_one_experts_logits_does_not_matter() -> None:
    scale = torch.tensor([1.0, 1e-8, 1, 1, 1e6, 1, 1, 1], dtype=torch.float64)
    evidence = evidence_of()
    gram = evidence.stats.logit_gram * scale[:, None] * scale
    scaled = replace(evidence, stats=replace(evidence.stats, logit_gram=gram))
    found = SIMILARITIES["router-logits"](scaled)
    torch.testing.assert_close(found, SIMILARITIES["router-logits"](evidence))


def test_an_expert_no_token_reached_is_similar_to_none_by_feature() -> None:
    evidence = evidence_of()
    evidence.stats.output_sum[2] = 0
    found = SIMILARITIES["expert-feature"](evidence)
    assert torch.equal(found[2], torch.eye(8, dtype=torch.float64)[2])
    torch.testing.assert_close(found, pairwise_cosine(evidence.stats.mean_output))


def test_expert_weight_is_the_cosine_of_all_weights_in_any_chunk_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = random_bank("biased", E=8, F=5, D=7)
    evidence = replace(evidence_of(), bank=lambda: bank)
    flat = torch.cat([t.flatten(1) for t in bank.tensors().values()], 1)
    for elements in (1, 24, 1 << 24):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
        found = SIMILARITIES["expert-weight"](evidence)
        torch.testing.assert_close(found, pairwise_cosine(flat), atol=1e-6, rtol=0)


def test_random_similarity_is_its_seed() -> None:
    one, same, other = (SIMILARITIES["random"](evidence_of(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_opposite_in_both_respects_is_not_alike() -> None:
    stats = random_stats(E=3)
    vectors = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.3, 1.0]], dtype=torch.float64)
    stats = replace(
        stats, logit_gram=vectors @ vectors.T, output_sum=vectors @ torch.eye(2, 6).double()
    )
    found = find_similarity("router-logits*expert-feature")(Evidence(stats))
    assert found[0, 1] < found[0, 2]


def test_what_the_evidence_lacks_is_named() -> None:
    stats = replace(random_stats(), logit_gram=torch.zeros(8, 8, dtype=torch.float64))
    for name, hint in (
        ("router-logits", "no router logits"),
        ("expert-weight", "not at hand"),
        ("router-weight", "one row per expert"),
    ):
        with pytest.raises(PlanError, match=hint):
            SIMILARITIES[name](Evidence(stats))


def test_a_misspelt_similarity_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'router-logits'.*expert-feature"):
        find_similarity("router-logit*random")


def test_outside_code_is_a_module_and_a_function() -> None:
    assert find_similarity("smelt.compress.similarity:random") is SIMILARITIES["random"]
    with pytest.raises(RecipeError, match="cannot be imported"):
        find_similarity("no_such_module:f")
    with pytest.raises(RecipeError, match="holds no 'f'"):
        find_similarity("smelt.compress.similarity:f")
