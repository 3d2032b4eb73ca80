"""The obvious, slow versions of the groupings: distances written out, one join at a time."""

from math import dist

from reference.compression import cosine_of


def average_linkage(rows: list[list[float]], number: int) -> set[frozenset[int]]:
    """Join the two clusters whose members are nearest on average, until `number` are left."""
    clusters = [[i] for i in range(len(rows))]
    while len(clusters) > number:
        best, pair = float("inf"), (0, 0)
        for a in range(len(clusters)):
            for b in range(a + 1, len(clusters)):
                pairs = [dist(rows[i], rows[j]) for i in clusters[a] for j in clusters[b]]
                if (mean := sum(pairs) / len(pairs)) < best:
                    best, pair = mean, (a, b)
        a, b = pair
        clusters[a] += clusters.pop(b)
    return {frozenset(c) for c in clusters}


def centroid_groups(
    similarity: list[list[float]], score: list[float], kept: list[int], capacity: int
) -> set[frozenset[int]]:
    """The best kept expert takes its likest free experts, then the next, until none is free."""
    free = [e for e in range(len(score)) if e not in kept]
    room = max(capacity - 1, -(-len(free) // len(kept)))
    groups = []
    for centroid in sorted(kept, key=lambda e: (-score[e], e)):
        group = [centroid]
        while free and len(group) <= room:
            best = free[0]
            for e in free:
                if similarity[centroid][e] > similarity[centroid][best]:
                    best = e
            group.append(best)
            free.remove(best)
        groups.append(group)
    assert not free
    return {frozenset(g) for g in groups}


def gated_output_similarity(
    outputs: list[list[list[float]]], gates: list[list[float]]
) -> list[list[float]]:
    """Cosines of gate times output, tokens laid end to end: outputs[e][t], gates[t][e]."""
    ends = [
        [g[e] * v for t, g in zip(out, gates, strict=True) for v in t]
        for e, out in enumerate(outputs)
    ]
    return [
        [1.0 if i == j else cosine_of(a, b) for j, b in enumerate(ends)] for i, a in enumerate(ends)
    ]
