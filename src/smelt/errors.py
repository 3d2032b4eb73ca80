"""Errors for a user's mistake: each says what was given, what is allowed, what to do next."""


class SmeltError(Exception):
    """Something the user can mend. The command line prints its message and exits with code 2."""


class RecipeError(SmeltError):
    """A setting that does not exist, or a value it cannot take."""


class CheckpointError(SmeltError):
    """A checkpoint that cannot be read, or an output folder that cannot be written."""


class CalibrationError(SmeltError):
    """Text that cannot be calibrated on, or statistics that belong to another checkpoint."""


class PlanError(SmeltError):
    """A compression that cannot exist: a budget, form or family that do not fit together."""
