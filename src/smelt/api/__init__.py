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
from smelt.api.evaluating import evaluate, generate, last_of, spreads_of
from smelt.api.measuring import analyse, bench, report
from smelt.api.training import export, export_gguf, heal, study, train

__all__ = [
    "analyse",
    "apply",
    "bench",
    "calibrate",
    "calibrate_by",
    "compress",
    "compress_by",
    "evaluate",
    "export",
    "export_gguf",
    "generate",
    "heal",
    "inspect",
    "last_of",
    "load_stats",
    "open_checkpoint",
    "plan",
    "report",
    "spreads_of",
    "study",
    "train",
]
