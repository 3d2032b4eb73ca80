"""What keeping a share of the experts would save, before anything is calibrated or planned."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from smelt.compress.budget import check_count
from smelt.compress.check import router_groups_of
from smelt.compress.plan import LayerFacts
from smelt.compress.predict import layer_bytes
from smelt.errors import PlanError

SHARES = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Outlook:
    """The stock checkpoint that a share of the experts makes."""

    keep: float
    experts: int  # per layer, the nearest count that the router can hold
    is_exact: bool  # whether that is the count the share asks for
    bytes_after: int
    saved: float  # of all bytes


def legal_counts(layer: LayerFacts) -> list[int]:
    """The expert counts that a stock checkpoint of this family can have."""
    counts = []
    for count in range(1, layer.num_experts + 1):
        try:
            check_count(count, layer.num_experts, layer.top_k, router_groups_of(layer))
        except PlanError:
            continue
        counts.append(count)
    return counts


def outlook(
    layers: Sequence[LayerFacts], other_bytes: int, shares: Sequence[float] = SHARES
) -> list[Outlook]:
    """The stock checkpoint at each share, at the nearest legal count (of two, the larger)."""
    counts = legal_counts(layers[0])
    before = other_bytes + sum(
        layer_bytes(layer, "stock", layer.num_experts)[0] for layer in layers
    )
    found = []
    for share in shares:
        wanted = floor(layers[0].num_experts * share + 0.5)
        count = min(counts, key=lambda n: (abs(n - wanted), -n))
        after = other_bytes + sum(layer_bytes(layer, "stock", count)[1] for layer in layers)
        found.append(Outlook(share, count, count == wanted, after, 1 - after / before))
    return found
