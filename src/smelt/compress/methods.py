"""The named methods as coordinates: what a method is, is a row of this table."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from smelt.plugins import find
from smelt.recipe import CompressRecipe

Operator = Literal["merge", "drop", "constant"]
"""merge; drop: only the dominant experts stay; constant: vectors in the place of the others."""


@dataclass(frozen=True)
class Method:
    """One choice per stage. Names of tables, or "module:function" for outside code."""

    operator: Operator
    score: str  # who is dominant; also what "usage" weights are proportional to
    similarity: str = "router-logits"  # who joins whom
    grouping: str = "nearest"  # by which rule: a row of GROUPINGS
    budget: str = "uniform"  # "uniform": as many in every layer; "global": by the score, for the
    # model as a whole; "measured": by what each layer's output loses
    align: str = "weights"  # "weights", "activations", "both" or "none"
    reference: str = "dominant"  # whom members are aligned to: "dominant", "first" or "others"
    weights: str = "usage"
    rule: str = "sum"  # how aligned, weighted members become one: a row of RULES
    repair: bool = False  # renormalise the merged hidden units' statistics
    router: str = "dominant"  # the router rows of a stock checkpoint
    sequential: bool = False  # layers are decided on the stream of the compressed ones


def _m_smoe(**changes: Any) -> Method:
    """The budget and the groups of M-SMoE, and another way to make one expert of a group."""
    return replace(Method(operator="merge", score="count", budget="global"), **changes)


METHODS_TABLE: dict[str, Method] = {  # M-SMoE: arXiv:2310.01334; REAP: arXiv:2510.13999
    "m-smoe": _m_smoe(),
    "m-smoe-saliency": Method(operator="merge", score="saliency", budget="global"),
    "frequency": Method(operator="drop", score="count"),
    "ean": Method(operator="drop", score="ean"),
    "reap": Method(operator="drop", score="mean-saliency"),
    # Ours: REAP's experts, and the tokens of the others go to the most similar one that stays.
    "reap-redirect": Method(
        operator="merge", score="mean-saliency", align="none", weights="dominant"
    ),
    # What the M-SMoE paper compares with, on the same budget and in the same groups.
    "prune": _m_smoe(operator="drop"),
    "redirect": _m_smoe(align="none", weights="dominant"),
    "average": _m_smoe(align="none", weights="mean"),
    "zipit": _m_smoe(align="none", weights="mean", rule="zipit"),  # arXiv:2305.03053
    "repair": _m_smoe(align="activations", weights="mean", repair=True),  # arXiv:2211.08403
    "git-rebasin": _m_smoe(reference="others", weights="mean"),  # arXiv:2209.04836
    "fisher": _m_smoe(weights="mean", rule="fisher"),  # arXiv:2111.09832
    "regmean": _m_smoe(rule="regmean"),  # arXiv:2212.09849
    # Later work, each with the budget and the groups of its own.
    "mone": Method(operator="constant", score="usage-variance"),  # arXiv:2507.00390
    "hc-smoe": Method(  # arXiv:2410.08589
        operator="merge", score="count", grouping="hierarchical", align="none"
    ),
    "ream": Method(  # arXiv:2604.04356
        operator="merge",
        score="mean-saliency",
        similarity="gated-output+router-logits",
        grouping="centroids",
        align="both",
        sequential=True,
    ),
    "merge-moe": _m_smoe(rule="least-squares"),  # arXiv:2510.14436
    "sub-moe": Method(  # arXiv:2506.23266
        operator="merge", score="count", grouping="k-means", align="none", rule="subspace"
    ),
}


def resolve(recipe: CompressRecipe) -> Method:
    """The method a recipe names, with the coordinates that the recipe sets itself.

    Of `auto` it is the first candidate, with as many experts in every layer.

    A stock checkpoint has as many experts in every layer: where the recipe says nothing about the
    budget, its form decides.
    """
    method = find(METHODS_TABLE, recipe.candidates[0], "method")
    if recipe.method == "auto":
        method = replace(method, budget="uniform")
    if recipe.form == "stock" and method.budget == "global" and recipe.budget is None:
        method = replace(method, budget="uniform")
    own = {f.name: getattr(recipe, f.name, None) for f in fields(Method)}
    return replace(method, **{name: value for name, value in own.items() if value is not None})
