"""smelt from Python: every command as a function. The commands call these.

Settings are those of a recipe, by the same names: `compress("in", "out", keep=0.5, form="mapped",
text=["notes.txt"])`. A name that does not exist is an error that lists those that do.
"""

from smelt.api.compressing import (
    apply,
    calibrate,
    calibrate_by,
    compress,
    compress_by,
    inspect,
    load_stats,
    open_checkpoint,
    plan,
)
from smelt.api.measuring import analyse, evaluate
from smelt.api.training import export, export_gguf, heal, study, train

__all__ = [
    "analyse",
    "apply",
    "calibrate",
    "calibrate_by",
    "compress",
    "compress_by",
    "evaluate",
    "export",
    "export_gguf",
    "heal",
    "inspect",
    "load_stats",
    "open_checkpoint",
    "plan",
    "study",
    "train",
]
