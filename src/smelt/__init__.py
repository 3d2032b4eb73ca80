"""smelt shrinks mixture-of-experts checkpoints, and measures what that cost.

    from smelt.api import compress

    compress("Qwen3-30B-A3B", "small", experts=64)

`smelt.api` has a function for each command (`inspect`, `compress`, `evaluate`, `train`, `heal`, …);
a mistake of the caller's raises `SmeltError`. Importing smelt lets transformers' Auto classes load
checkpoints of the mapped form and SaMoE models.
"""

from smelt.checkpoint import mapped
from smelt.errors import (
    CalibrationError,
    CheckpointError,
    PlanError,
    RecipeError,
    SmeltError,
)
from smelt.samoe.model import register as register_samoe

# Lead's decision: plain and eager. No import hooks, no callable modules (`compress` and `evaluate`
# are packages; the verbs of those names live in `smelt.api`).
__version__ = "0.1.0"
__all__ = ["CalibrationError", "CheckpointError", "PlanError", "RecipeError", "SmeltError"]

mapped.register()
register_samoe()
