"""What is known of each layer while its model is walked: what decisions are made from."""

from functools import partial

from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import RoutingStats
from smelt.compress.decide import layer_seed
from smelt.compress.facts import Facts, bank_reader, router_reader
from smelt.compress.plan import Plan
from smelt.compress.similarity import Evidence
from smelt.routing import LayerStats


class Known:
    """The one-shot statistics, and those of the compressed stream in the place of them.

    Attributes:
        found: by layer, of the compressed stream; whoever walks puts them there.
    """

    def __init__(
        self, checkpoint: Checkpoint, facts: Facts, plan: Plan, one_shot: RoutingStats
    ) -> None:
        self.found: dict[str, LayerStats] = {}
        self._one_shot = one_shot
        self._seed = plan.recipe.seed
        self._banks = bank_reader(checkpoint, facts)
        self._routers = router_reader(checkpoint, facts)
        self._positions = {layer.name: i for i, layer in enumerate(plan.layers)}

    def stats(self, name: str) -> LayerStats | None:
        """A layer's statistics, where it has any."""
        return self.found.get(name) or self._one_shot.layers.get(name)

    def evidence(self, name: str) -> Evidence:
        """All that a layer, which must have statistics, is decided from."""
        stats = self.stats(name)
        assert stats is not None, "a layer that is decided has statistics"
        seed = layer_seed(self._seed, self._positions[name])
        return Evidence(stats, partial(self._banks, name), self._routers(name), seed)
