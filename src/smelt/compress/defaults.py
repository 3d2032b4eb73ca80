"""What `smelt compress` does where nothing is said: it calibrates on enough text, and repairs.

The plain pipeline does what a recipe says and no more; here is what is filled in before it.
"""

import warnings
from pathlib import Path

from smelt.compress.calibrate import RoutingStats
from smelt.compress.pipeline import Stages, run_compress, silent
from smelt.compress.reconstructor import CannotFitError
from smelt.errors import CalibrationError
from smelt.recipe import CalibrationRecipe, CompressRecipe, ReconstructRecipe
from smelt.settings import check_recipe

TOKENS = 131_072
"""To calibrate on where layers are fitted: fewer, and the fit follows its tokens."""


def compress_with_defaults(
    recipe: CompressRecipe,
    *,
    stats: RoutingStats | None = None,
    verify: bool = True,
    stages: Stages = silent,
) -> Path:
    """`run_compress` of the recipe with what it leaves open filled in; returns the new folder.

    A family whose layers cannot be fitted, or statistics whose text is not there any more, are
    compressed without, and a warning says so, unless the recipe asks for the fit itself.
    """
    filled = fill(recipe, stats)
    try:
        return run_compress(filled, stats=stats, verify=verify, stages=stages)
    except (CannotFitError, CalibrationError) as error:
        is_default = filled.reconstruct is not None and "reconstruct" not in recipe.model_fields_set
        if not is_default or (stats is None and isinstance(error, CalibrationError)):
            raise
        reason = error
    plain = filled.model_copy(update={"reconstruct": None})
    folder = run_compress(plain, stats=stats, verify=False, stages=stages)
    warnings.warn(f"The layers are not repaired: {reason}", stacklevel=2)
    return folder


def fill(recipe: CompressRecipe, stats: RoutingStats | None) -> CompressRecipe:
    """The recipe with what was not said: the fit, the text of the statistics, enough of it.

    * `reconstruct` left out is its defaults, but for the expanded form, which cannot be fitted.
    * With statistics, text that is walked again is theirs, where none is named.
    * Without, `num_tokens` left out is `TOKENS` where layers are fitted.
    """
    told = recipe.calibration.model_fields_set
    fit, calibration = recipe.reconstruct, recipe.calibration
    if "reconstruct" not in recipe.model_fields_set and recipe.form != "expanded":
        fit = ReconstructRecipe()
    if stats is not None and not told & {"text", "task"}:
        said = calibration.model_dump(mode="json", include=told)
        calibration = check_recipe(stats.details | said, CalibrationRecipe, origin="statistics")
    elif stats is None and fit is not None and "num_tokens" not in told:
        calibration = calibration.model_copy(update={"num_tokens": TOKENS})
    return recipe.model_copy(update={"reconstruct": fit, "calibration": calibration})
