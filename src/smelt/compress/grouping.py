"""Groups of experts: who joins whom, once it is known how many experts a layer keeps.

Groups are numbered by ascending dominant id, so that the kept rows of a router stay in order.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from smelt.compress.group import join_most_similar

Groups = tuple[Int[Tensor, " E"], Int[Tensor, " G"]]
"""The group of each expert, and the dominant expert of each group, ascending."""

CAPACITY = 16
"""Experts that a group of `centroids` holds at most (REAM's C)."""


@dataclass(frozen=True)
class Candidates:
    """What a grouping is made from: E experts of one layer, G of which are to stay."""

    kept: Int[Tensor, " G"]  # those with the best scores, and the protected ones; ascending
    score: Float[Tensor, " E"]
    similarity: Callable[[], Float[Tensor, "E E"]]  # made when it is asked for
    features: Float[Tensor, "E D"]  # mean outputs; 0 of an expert that no token reached
    protected: Collection[int] = ()
    router_groups: int = 1  # runs of experts that no group crosses


Grouping = Callable[[Candidates], Groups]


def nearest(found: Candidates) -> Groups:
    """Every other expert joins the kept one that is most similar to it: M-SMoE."""
    labels = join_most_similar(
        found.similarity(),
        found.kept,
        protected=found.protected,
        router_groups=found.router_groups,
    )
    return labels, found.kept


def centroids(found: Candidates) -> Groups:
    """The kept experts, best first, each take their most similar free experts, up to a capacity.

    Most groups stay groups of one. Where the capacity is too small for all to find a place, it is
    what an equal share needs. Ties go to the lower id.

    Source: REAM, arXiv:2604.04356.
    """
    similarity = found.similarity()
    labels = torch.full((len(found.score),), -1, dtype=torch.int64)
    labels[found.kept] = torch.arange(len(found.kept))
    for run in _runs(found):
        here = [e for e in found.kept.tolist() if e in run]
        order = sorted((e for e in here if e not in found.protected), key=_by(found.score))
        free = [e for e in run if labels[e] < 0]
        room = max(CAPACITY - 1, -(-len(free) // max(1, len(order))))
        for centroid in order:
            chosen = sorted(free, key=lambda e: (-float(similarity[centroid, e]), e))[:room]
            labels[chosen] = labels[centroid].clone()
            free = [e for e in free if e not in chosen]
        assert not free, "a kept expert that is not protected takes what is left"
    return labels, found.kept


def hierarchical(found: Candidates) -> Groups:
    """Clusters of mean outputs by average linkage, Euclidean; their best experts are dominant.

    Source: HC-SMoE, arXiv:2410.08589.
    """
    return _clustered(found, _average_linkage)


def k_means(found: Candidates) -> Groups:
    """Clusters of mean outputs by k-means on their cosines; their best experts are dominant.

    Begins at the expert with the best score and, in turn, that which is least like all chosen ones,
    so nothing is drawn by chance.

    Source: Sub-MoE, arXiv:2506.23266; the beginning is ours.
    """
    return _clustered(found, _spherical_k_means)


GROUPINGS: dict[str, Grouping] = {
    "nearest": nearest,
    "centroids": centroids,
    "hierarchical": hierarchical,
    "k-means": k_means,
}


def _clustered(
    found: Candidates, cluster: Callable[[np.ndarray, int, np.ndarray], list[int]]
) -> Groups:
    """Clusters in every run of experts, as many as are kept there; protected experts alone."""
    features, score = found.features.double().numpy(), found.score.double().numpy()
    groups: list[list[int]] = [[e] for e in sorted(found.protected)]
    kept = set(found.kept.tolist())
    for run in _runs(found):
        ids = [e for e in run if e not in found.protected]
        number = len([e for e in ids if e in kept])
        if not ids:
            continue
        labels = cluster(features[ids], number, score[ids])
        groups += [[e for e, g in zip(ids, labels, strict=True) if g == n] for n in range(number)]
    best = [min(group, key=_by(found.score)) for group in groups]
    order = sorted(range(len(groups)), key=best.__getitem__)
    joined = torch.full((len(score),), -1, dtype=torch.int64)
    for number, index in enumerate(order):
        joined[groups[index]] = number
    return joined, torch.tensor([best[index] for index in order])


def _average_linkage(features: np.ndarray, number: int, score: np.ndarray) -> list[int]:  # noqa: ARG001 - the signature of its kind
    """The clusters that are left when all but `number` of them have been joined."""
    members = [[i] for i in range(len(features))]
    if number == len(features):
        return list(range(number))
    tree = linkage(features, method="average", metric="euclidean")
    alive = set(range(len(features)))
    for a, b, *_ in tree[: len(features) - number].astype(int):
        members.append(members[a] + members[b])
        alive = (alive - {a, b}) | {len(members) - 1}
    found = [0] * len(features)
    for label, index in enumerate(sorted(alive, key=lambda i: min(members[i]))):
        for member in members[index]:
            found[member] = label
    return found


def _spherical_k_means(features: np.ndarray, number: int, score: np.ndarray) -> list[int]:
    """k-means of unit vectors; a cluster that runs empty takes the worst placed expert."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.divide(features, norm, out=np.zeros_like(features), where=norm > 0)
    chosen = [int(np.argmax(score))]
    while len(chosen) < number:
        nearest_of = (unit @ unit[chosen].T).max(1)
        nearest_of[chosen] = np.inf
        chosen.append(int(np.argmin(nearest_of)))
    centre = unit[chosen]
    labels = np.full(len(unit), -1)
    for _ in range(100):
        likeness = unit @ centre.T
        new = likeness.argmax(1)
        for empty in sorted(set(range(number)) - set(new.tolist())):
            sizes = np.bincount(new, minlength=number)
            free = [i for i in range(len(new)) if sizes[new[i]] > 1]
            new[min(free, key=lambda i: (likeness[i, new[i]], i))] = empty
        if (new == labels).all():
            break
        labels = new
        sums = np.stack([unit[labels == g].sum(0) for g in range(number)])
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centre = np.divide(sums, length, out=np.zeros_like(sums), where=length > 0)
    return labels.tolist()


def _runs(found: Candidates) -> list[range]:
    """The runs of experts that no group crosses."""
    size = len(found.score) // found.router_groups
    return [range(start, start + size) for start in range(0, len(found.score), size)]


def _by(score: Float[Tensor, " E"]) -> Callable[[int], tuple[float, int]]:
    """Sorts the best first, of equals the lower id."""
    return lambda e: (-float(score[e]), e)
