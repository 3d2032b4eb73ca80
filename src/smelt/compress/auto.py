"""Choosing a method for each layer: candidates are built, fitted for a moment, and measured."""

import logging
from collections.abc import Callable

from smelt.checkpoint.bind import MoeLayer
from smelt.compress.decide import candidate
from smelt.compress.layer import Changed, Compressor
from smelt.compress.plan import LayerPlan
from smelt.compress.reconstructor import Reconstructor
from smelt.compress.sample import LayerSample
from smelt.compress.similarity import Evidence
from smelt.errors import PlanError
from smelt.recipe import CompressRecipe

_log = logging.getLogger(__name__)


class Chooser:
    """Takes, layer by layer, the candidate whose held-out output error is least after a short fit.

    Then the experts whose loss may be what no fit mends: of those the chosen one does not keep, the
    ones that wrote most of the layer's output are each tried as protected, and stay so if that errs
    less.
    """

    def __init__(
        self,
        compressor: Compressor,
        reconstructor: Reconstructor,
        evidence: Callable[[str], Evidence],
    ) -> None:
        """
        Args:
            evidence: what is known of a layer, by its name.
        """
        self.compressor = compressor
        self.reconstructor = reconstructor
        self.evidence = evidence
        self.recipe: CompressRecipe = compressor.plan.recipe
        self.facts = {fact.name: fact for fact in compressor.facts.layers}

    def choose(
        self, layer: MoeLayer, plan: LayerPlan, sample: LayerSample
    ) -> tuple[LayerPlan, Changed]:
        """The layer as the best candidate has it, not fitted yet; the plan says what was tried."""
        known = self.evidence(layer.name)
        errors: dict[str, float] = {}
        best: tuple[LayerPlan, Changed] | None = None

        def trial(label: str, made: LayerPlan) -> bool:
            """Whether it is better than all before."""
            nonlocal best
            changed = self.compressor.compress(layer, made, known.stats)
            error = self.reconstructor.error(layer, changed, sample, self.recipe.auto.steps)
            is_best = best is None or error < min(errors.values())
            errors[label] = error
            if is_best:
                best = made, changed
            return is_best

        chosen = self.recipe.candidates[0]
        for name in self.recipe.candidates:
            if trial(name, self._candidate(plan, known, name)):
                chosen = name
        protected: list[int] = []
        for expert in self._lost(best[0], known) if best else ():
            wanted = sorted([*protected, expert])
            label = f"{chosen}, {', '.join(map(str, wanted))} protected"
            try:
                made = self._candidate(plan, known, chosen, wanted)
            except PlanError:  # no room for it among the experts of its router group
                continue
            if trial(label, made):
                protected = wanted
        assert best is not None, "there is a candidate"
        tried = {n: float(f"{e:.6g}") for n, e in sorted(errors.items(), key=lambda one: one[1])}
        _log.info("%s: %s of %d tried", layer.name, next(iter(tried)), len(tried))
        return best[0].model_copy(update={"tried": tried}), best[1]

    def _candidate(
        self, plan: LayerPlan, known: Evidence, name: str, protected: list[int] | None = None
    ) -> LayerPlan:
        fact = self.facts[plan.name]
        return candidate(plan, fact, known, self.recipe, name, protected or ())

    def _lost(self, plan: LayerPlan, known: Evidence) -> list[int]:
        """Experts that do not stay as they are, by what they wrote: the largest first.

        Σ (g·‖f‖)² of a token's choices, from below: the square of the sum over the count.
        """
        wrote = known.stats.gated_norm.square() / known.stats.count.clamp(min=1)
        lost = [e for e in range(plan.num_experts) if e not in plan.dominants]
        room = max(0, plan.num_groups - len(plan.protected) - 1)
        return sorted(lost, key=lambda e: (-float(wrote[e]), e))[
            : min(self.recipe.auto.protect, room)
        ]
