"""Laws of the groupings beside M-SMoE's own, and their slow versions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.grouping import average_linkage, centroid_groups, gated_output_similarity
from reference.samples import random_bank, random_stats
from smelt.compress.group import join_most_similar
from smelt.compress.grouping import GROUPINGS, Candidates
from smelt.compress.similarity import Evidence, find_similarity
from smelt.experts import apply

OWN = ("centroids", "hierarchical", "k-means")


def candidates(E: int, G: int, seed: int = 0, **more) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(E, generator=generator, dtype=torch.float64)
    draw = torch.rand(E, E, generator=generator, dtype=torch.float64)
    similarity = (draw + draw.T) / 2
    features = torch.randn(E, 5, generator=generator, dtype=torch.float64)
    runs = more.get("router_groups", 1)
    size = E // runs
    protected = set(more.get("protected", ()))
    kept = []
    for start in range(0, E, size):
        run = sorted(range(start, start + size), key=lambda e: (e not in protected, -score[e]))
        kept += run[: G // runs]
    return Candidates(torch.tensor(sorted(kept)), score, lambda: similarity, features, **more)


def sets(labels: torch.Tensor) -> set[frozenset[int]]:
    groups = range(int(labels.max()) + 1)
    return {frozenset(torch.where(labels == g)[0].tolist()) for g in groups}


@pytest.mark.parametrize("name", GROUPINGS)
@pytest.mark.parametrize("more", [{}, {"router_groups": 2}, {"protected": (1, 7)}], ids=str)
@pytest.mark.parametrize("G", [4, 6, 12])
def test_every_grouping_has_as_many_groups_as_experts_stay(name, more, G):
    found = candidates(12, G, **more)
    labels, dominants = GROUPINGS[name](found)
    assert len(dominants) == G == len(sets(labels))
    assert labels[dominants].tolist() == list(range(G))
    assert dominants.tolist() == sorted(dominants.tolist())
    assert (labels >= 0).all()
    for expert in more.get("protected", ()):
        assert frozenset([expert]) in sets(labels)
    if runs := more.get("router_groups"):
        assert all(len({e * runs // 12 for e in group}) == 1 for group in sets(labels))


@pytest.mark.parametrize("name", GROUPINGS)
def test_keeping_every_expert_leaves_each_alone(name):
    labels, dominants = GROUPINGS[name](candidates(7, 7))
    assert labels.tolist() == dominants.tolist() == list(range(7))


@pytest.mark.parametrize("name", OWN)
def test_the_dominant_expert_of_a_group_is_its_best(name):
    found = candidates(12, 5)
    labels, dominants = GROUPINGS[name](found)
    for group, dominant in enumerate(dominants.tolist()):
        members = torch.where(labels == group)[0]
        assert found.score[dominant] == found.score[members].max()


@pytest.mark.parametrize("name", ["hierarchical", "k-means"])
def test_experts_that_do_the_same_are_found(name):
    """Three bundles of four mean outputs, in any order."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    bundle = torch.arange(12) // 4
    features = torch.eye(5, dtype=torch.float64)[bundle] + 0.01 * torch.rand(12, 5)
    found = candidates(12, 3)
    labels, _ = GROUPINGS[name](
        Candidates(found.kept, found.score, found.similarity, features[order])
    )
    assert sets(labels) == {
        frozenset(torch.where(bundle[order] == b)[0].tolist()) for b in range(3)
    }


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 10), st.data())
def test_clusters_are_those_of_average_linkage_written_out(E, data):
    G = data.draw(st.integers(1, E))
    found = candidates(E, G, seed=data.draw(st.integers(0, 99)))
    labels, _ = GROUPINGS["hierarchical"](found)
    assert sets(labels) == average_linkage(found.features.tolist(), G)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.data())
def test_centroids_take_their_likest_in_order_of_their_scores(E, data):
    G = data.draw(st.integers(1, E))
    found = candidates(E, G, seed=data.draw(st.integers(0, 99)))
    labels, dominants = GROUPINGS["centroids"](found)
    assert torch.equal(dominants, found.kept)
    kept = found.kept.tolist()
    expected = centroid_groups(found.similarity().tolist(), found.score.tolist(), kept, 16)
    assert sets(labels) == expected


def test_the_first_centroids_take_all_and_the_others_stay_alone():
    labels, _ = GROUPINGS["centroids"](candidates(32, 16))
    assert sorted(len(group) for group in sets(labels)) == [1] * 14 + [2, 16]


def test_k_means_ends_where_every_expert_is_nearest_to_its_own_centre():
    found = candidates(40, 6)
    labels, _ = GROUPINGS["k-means"](found)
    unit = found.features / found.features.norm(dim=1, keepdim=True)
    centres = torch.stack([unit[labels == g].sum(0) for g in range(6)])
    likeness = unit @ (centres / centres.norm(dim=1, keepdim=True)).T
    assert torch.equal(likeness.argmax(1), labels)


def test_nearest_is_joining_the_most_similar():
    found = candidates(12, 4)
    labels, dominants = GROUPINGS["nearest"](found)
    assert torch.equal(labels, join_most_similar(found.similarity(), found.kept))
    assert torch.equal(dominants, found.kept)


def test_gated_outputs_are_compared_token_by_token():
    bank, stats = random_bank("gated", E=8, D=6), random_stats(D=6)
    evidence = Evidence(stats, lambda: bank)
    x, gates = stats.input_sample, stats.sample_logits.float().softmax(1)
    outputs = [apply(bank, e, x.to(bank.up)).tolist() for e in range(8)]
    expected = torch.tensor(gated_output_similarity(outputs, gates.tolist()))
    torch.testing.assert_close(find_similarity("gated-output")(evidence).float(), expected)


def test_a_sum_of_similarities_is_their_mean():
    bank, stats = random_bank("gated", E=8, D=6), random_stats(D=6)
    evidence = Evidence(stats, lambda: bank)
    both = find_similarity("gated-output+router-logits")(evidence)
    parts = [find_similarity(name)(evidence) for name in ("gated-output", "router-logits")]
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)
