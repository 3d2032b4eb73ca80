"""Fits the layers of a compression one at a time, and says what came of it."""

import logging
import warnings

import torch
from torch import nn

from smelt.checkpoint.bind import MoeLayer
from smelt.checkpoint.source import Checkpoint
from smelt.compress.capture import held_out_runs
from smelt.compress.facts import Facts
from smelt.compress.layer import Changed
from smelt.compress.plan import LayerFit, LayerPlan, Plan
from smelt.compress.reconstruct import Fit, fit
from smelt.compress.replacement import Originals, Replacement, Replacements, run_alone
from smelt.compress.sample import LayerSample, Reduce, alone
from smelt.errors import PlanError
from smelt.recipe import ReconstructRecipe
from smelt.routing import LayerStats

_NEEDS_MORE = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError)
"""What modules raise that are called without what they need."""

_COMPARED = 64
"""Tokens on which a layer by itself is held against the layer in its model."""

_log = logging.getLogger(__name__)


class CannotFitError(PlanError):
    """A layer of this family cannot be run apart from its model, so it cannot be fitted."""


class Reconstructor:
    """Fits what becomes of a layer to a sample of what the layer did."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        facts: Facts,
        plan: Plan,
        recipe: ReconstructRecipe,
        *,
        device: torch.device,
        reduce: Reduce = alone,
    ) -> None:
        self.recipe = recipe
        self.seed = plan.recipe.seed
        self.device = device
        self.reduce = reduce
        self.replacements = Replacements(checkpoint, facts, plan, recipe)
        self.original = Originals(checkpoint, device)

    def fit_to_sample(
        self, layer: MoeLayer, plan: LayerPlan, changed: Changed, stats: LayerStats | None
    ) -> tuple[LayerPlan, Changed]:
        """The same on the inputs that the statistics keep: what the original gives is made anew."""
        if stats is None:
            raise PlanError(
                "The plan reconstructs layers on the stored inputs, which are in the statistics it "
                "was made from: give them with --stats."
            )
        x = stats.input_sample.to(self.device)
        try:
            target, choice = self.original.outputs(layer, x)
        except _NEEDS_MORE as error:
            raise CannotFitError(
                _not_alone(layer, f"it needs more than its tokens: {error}")
            ) from None
        same = choice.cpu().sort().values == stats.sample_choice.sort().values
        if same.float().mean() < 0.9:
            raise CannotFitError(_not_alone(layer, "it chooses other experts when it is run alone"))
        return self.fit(
            layer,
            plan,
            changed,
            LayerSample(x, target, held_out_runs(len(x), self.recipe.held_out).to(x.device)),
        )

    def error(self, layer: MoeLayer, changed: Changed, sample: LayerSample, steps: int) -> float:
        """The held-out error after a fit of so many steps, which is thrown away."""
        with self.replacements.of(layer, changed.tensors, self.device) as made:
            recipe = _raised(self.recipe, _numbers_each(made, sample))
            return self._fit(made, sample, recipe.model_copy(update={"steps": steps})).after

    def fit(
        self, layer: MoeLayer, plan: LayerPlan, changed: Changed, sample: LayerSample
    ) -> tuple[LayerPlan, Changed]:
        """The layer with its parameters fitted, and its plan with what that did."""
        with self.replacements.of(layer, changed.tensors, self.device) as made:
            ratio = _numbers_each(made, sample)
            _warn_if_few(layer, made, sample, ratio)
            found = self._fit(made, sample, _raised(self.recipe, ratio))
            new = made.tensors()
        _say(layer, found)
        router = {n for n in new if not n.startswith(layer.experts + ".")}
        result = Changed(changed.tensors | new, changed.replaced | router)
        return plan.model_copy(update={"fit": _recorded(found)}), result

    def _fit(self, made: Replacement, sample: LayerSample, recipe: ReconstructRecipe) -> Fit:
        solve = None
        if recipe.closed_form and made.has_closed_form:
            solve = lambda known, reduce: made.solve(known, reduce, recipe)  # noqa: E731
        return fit(
            made.run,
            made.parameters,
            sample,
            recipe,
            start=made.start,
            solve=solve,
            reduce=self.reduce,
            seed=self.seed,
        )


def _recorded(found: Fit) -> LayerFit:
    return LayerFit(
        before=_short(found.before),
        after=_short(found.after),
        solved=None if found.solved is None else _short(found.solved),
        steps=found.steps,
        best_step=found.best_step,
        tokens=found.num_tokens,
        parameters=found.num_params,
        ended=found.ended,
    )


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _numbers_each(made: Replacement, sample: LayerSample) -> float:
    """Numbers in the targets for each parameter that is fitted to them."""
    params = sum(p.numel() for p in made.parameters.values())
    return sample.num_tokens * sample.x.shape[1] / max(1, params)


def _raised(recipe: ReconstructRecipe, ratio: float) -> ReconstructRecipe:
    """The recipe, its regularisation raised where the tokens say less than is asked of them."""
    if ratio >= 1:
        return recipe
    return recipe.model_copy(
        update={"ridge": recipe.ridge / ratio, "anchor": max(recipe.anchor, 0.01 / ratio)}
    )


def _warn_if_few(layer: MoeLayer, made: Replacement, sample: LayerSample, ratio: float) -> None:
    if ratio < 1:
        params = sum(p.numel() for p in made.parameters.values())
        warnings.warn(
            f"{layer.name}: {sample.num_tokens:,} tokens of {sample.x.shape[1]} numbers are fitted "
            f"with {params:,} parameters, {ratio:.2f} numbers for each. The fit is held nearer to "
            "its start; more calibration tokens (num_tokens) would do better.",
            stacklevel=3,
        )


def _say(layer: MoeLayer, found: Fit) -> None:
    _log.info(
        "%s: error %.4f -> %.4f in %d steps (%s)",
        layer.name,
        found.before,
        found.after,
        found.steps,
        found.ended,
    )
    if found.ended == "diverged":
        warnings.warn(
            f"{layer.name}: the fit diverged after {found.steps} steps; its best state is kept "
            f"(error {found.before:.4f} before, {found.after:.4f} now). A lower reconstruct.rate "
            "would hold.",
            stacklevel=3,
        )


def check_alone(model: nn.Module, layer: MoeLayer, sample: LayerSample, dtype: torch.dtype) -> None:
    """Refuse a layer that does something else in its model than apart from it.

    Args:
        model: holds the layer's weights.
        sample: its inputs, and what it gave for them in the model.
        dtype: that the model computes in.
    """
    x, wanted = sample.x[:_COMPARED], sample.target[:_COMPARED].float()
    if not len(x):  # a process without tokens
        return
    try:
        found = run_alone(model, layer, x.to(dtype))[0].float()
    except torch.OutOfMemoryError:
        raise
    except _NEEDS_MORE as error:
        raise CannotFitError(_not_alone(layer, f"it needs more than its tokens: {error}")) from None
    if (found - wanted).norm() > 0.1 * wanted.norm():
        raise CannotFitError(_not_alone(layer, "it gives something else when it is run alone"))


def check_runs_alone(facts: Facts) -> None:
    """Refuse a family whose blocks hold the experts themselves: no module is a layer there."""
    for layer in facts.anatomy.layers:
        if layer.name == layer.block:
            raise CannotFitError(
                _not_alone(layer, "it holds router and experts beside its attention")
            )


def _not_alone(layer: MoeLayer, why: str) -> str:
    return (
        f"reconstruct runs MoE layers token by token, apart from their model, and {layer.name} "
        f"cannot be run so: {why}. Leave reconstruct out."
    )
