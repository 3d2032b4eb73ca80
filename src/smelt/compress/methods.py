"""The named methods as coordinates: what a method is, is a row of this table."""

from dataclasses import dataclass, fields, replace

from smelt.plugins import find
from smelt.recipe import CompressRecipe


@dataclass(frozen=True)
class Method:
    """One choice per stage. Names of tables, or "module:function" for outside code."""

    operator: str  # "merge", or "drop": only the dominant experts stay
    score: str  # who is dominant; also what "usage" weights are proportional to
    similarity: str = "router-logits"  # who joins whom
    budget: str = "uniform"  # "uniform": as many in every layer; "global": one for the model
    align: str = "weights"  # "weights", "activations" or "none"
    reference: str = "dominant"  # whom members are aligned to: "dominant" or "first"
    weights: str = "usage"
    router: str = "dominant"  # the router rows of a stock checkpoint


METHODS_TABLE: dict[str, Method] = {  # M-SMoE: arXiv:2310.01334; REAP: arXiv:2510.13999
    "m-smoe": Method(operator="merge", score="count", budget="global"),
    "m-smoe-saliency": Method(operator="merge", score="saliency", budget="global"),
    "frequency": Method(operator="drop", score="count"),
    "ean": Method(operator="drop", score="ean"),
    "reap": Method(operator="drop", score="mean-saliency"),
}


def resolve(recipe: CompressRecipe) -> Method:
    """The method a recipe names, with the coordinates that the recipe sets itself.

    A stock checkpoint has as many experts in every layer: where the recipe says nothing about the
    budget, its form decides.
    """
    method = find(METHODS_TABLE, recipe.method, "method")
    if recipe.form == "stock" and method.budget == "global":
        method = replace(method, budget="uniform")
    own = {f.name: getattr(recipe, f.name, None) for f in fields(Method)}
    return replace(method, **{name: value for name, value in own.items() if value is not None})
