import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.compression import most_similar
from smelt.compress.group import drop_others, join_most_similar
from smelt.errors import PlanError


def symmetric(E: int, seed: int = 0) -> torch.Tensor:
    draw = torch.rand(E, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (draw + draw.T) / 2


@settings(deadline=None)
@given(st.integers(2, 12), st.data())
def test_every_expert_joins_the_dominant_most_similar_to_it(E: int, data: st.DataObject) -> None:
    similarity = symmetric(E, data.draw(st.integers(0, 99))).mul(4).round()  # many ties
    dominants = sorted(data.draw(st.sets(st.integers(0, E - 1), min_size=1)))
    labels = join_most_similar(similarity, torch.tensor(dominants))
    assert labels.tolist() == most_similar(similarity.tolist(), dominants)


def test_a_dominants_rank_is_not_its_id() -> None:
    # Experts 0 and 1 are like expert 5, the second dominant; like expert 1, by rank, is nobody.
    similarity = torch.eye(6)
    similarity[0, 5] = similarity[1, 5] = similarity[2, 3] = similarity[4, 3] = 0.9
    labels = join_most_similar(similarity, torch.tensor([3, 5]))
    assert labels.tolist() == [1, 1, 0, 0, 0, 1]


def test_nobody_joins_a_protected_expert() -> None:
    similarity = torch.ones(5, 5)
    labels = join_most_similar(similarity, torch.tensor([0, 2, 4]), protected=[0, 4])
    assert labels.tolist() == [0, 1, 1, 1, 2]
    with pytest.raises(PlanError, match=r"experts \[1, 3\] have no group"):
        join_most_similar(similarity, torch.tensor([0, 2, 4]), protected=[0, 2, 4])


def test_no_group_crosses_a_router_group() -> None:
    similarity = symmetric(8)
    similarity[:, 4] = 5.0  # everyone's favourite
    dominants = torch.tensor([1, 2, 4, 7])
    labels = join_most_similar(similarity, dominants, router_groups=2)
    assert (dominants[labels] // 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert join_most_similar(similarity, dominants)[0] == 2


def test_dropping_leaves_each_kept_expert_alone() -> None:
    assert drop_others(torch.tensor([1, 3]), 5).tolist() == [-1, 0, -1, 1, -1]
