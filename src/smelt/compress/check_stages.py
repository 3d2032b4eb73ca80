"""What is refused of a compression's further stages: fewer units, factors, fits."""

from collections.abc import Sequence

from smelt.compress.methods import resolve
from smelt.compress.plan import LayerFacts
from smelt.errors import PlanError
from smelt.recipe import CompressRecipe

UNITS_MULTIPLE = 16
"""Grouped kernels want hidden sizes in multiples of this."""


def check_reconstruct(recipe: CompressRecipe) -> None:
    """A fit needs a layer that can change by itself, and inputs of the stream it is for."""
    assert recipe.reconstruct is not None
    target, inputs = recipe.reconstruct.target, recipe.reconstruct.inputs
    if recipe.form == "expanded":
        raise PlanError(
            "the expanded form repeats each merged expert in all its places, and a fit would make "
            "them different experts. Reconstruct the mapped form: it is the same function."
        )
    is_sequential = resolve(recipe).sequential
    if is_sequential and target == "layer":
        raise PlanError(
            "sequential decides layers on the compressed stream, reconstruct.target = layer fits "
            "them on the original one. Set reconstruct.target: sequential or corrected."
        )
    if inputs == "sample" and (target not in (None, "layer") or is_sequential):
        raise PlanError(
            "the inputs that the statistics keep are of the original stream: with "
            "reconstruct.inputs = sample, set reconstruct.target: layer, and not sequential."
        )


def check_hidden_units(facts: Sequence[LayerFacts], recipe: CompressRecipe) -> None:
    """Hidden units can leave an ordinary checkpoint whose experts are of one size."""
    number = recipe.hidden_units or 0
    if recipe.form != "stock":
        raise PlanError(
            f"hidden_units makes a smaller ordinary checkpoint: set form: stock, not {recipe.form}."
        )
    sizes = {layer.hidden_size for layer in facts}
    if len(sizes) > 1:
        raise PlanError(
            f"hidden_units: the layers have experts of {sorted(sizes)} hidden units, and one "
            "configuration field sizes them all. Leave it out."
        )
    most = (min(sizes) - 1) // UNITS_MULTIPLE * UNITS_MULTIPLE
    if number % UNITS_MULTIPLE or not 0 < number <= most:
        raise PlanError(
            f"hidden_units = {number}: the experts have {min(sizes)}, and what is kept is a "
            f"multiple of {UNITS_MULTIPLE}, {UNITS_MULTIPLE} to {most}."
        )


def check_decompose(facts: Sequence[LayerFacts], recipe: CompressRecipe) -> None:
    """Factors need the mapped form, and ranks that the matrices have."""
    assert recipe.decompose is not None
    if recipe.form != "mapped":
        raise PlanError(
            f"decomposed experts are of the mapped form, not of {recipe.form}: no ordinary "
            "checkpoint holds factors. Set form: mapped; hidden_units shrinks the stock form."
        )
    if resolve(recipe).sequential:
        raise PlanError("sequential decides as it walks, decompose over all layers. Drop one.")
    size, keep = recipe.decompose.size, recipe.decompose.keep
    if size is not None and size <= keep:
        raise PlanError(
            f"decompose.size = {size}: the rows of S take decompose.keep = {keep} of the bytes and "
            "more, which leaves nothing for U and V. Give a larger size, or keep fewer rows."
        )
    if recipe.decompose.rank is None:
        return
    for layer in facts:
        most = min(layer.model_size, layer.hidden_size)
        if recipe.decompose.rank > most:
            raise PlanError(
                f"decompose.rank = {recipe.decompose.rank}: the matrices of {layer.name} are "
                f"{layer.hidden_size} x {layer.model_size}, so no rank above {most} says more."
            )
