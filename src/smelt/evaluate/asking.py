"""How tasks are asked: the settings of `smelt evaluate --tasks`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from smelt.settings import Settings


class Asking(Settings):
    """Settings of tasks beside their names."""

    shots: Annotated[int | None, Field(ge=0)] = None
    """Solved examples before every question; None: as many as each task has, mostly none."""
    execute_code: bool = False  # allow tasks that run what the model writes
    task_folder: Path | None = None  # of more tasks of lm-evaluation-harness
    compare: bool = False  # every checkpoint with the first, item by item
