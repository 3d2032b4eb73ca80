"""The tasks a causal model is asked with no training for them: file, prompt, answers, metrics."""

from smelt.evaluate.task_choices import CHOICES
from smelt.evaluate.task_kinds import Task
from smelt.evaluate.task_superglue import SUPERGLUE
from smelt.evaluate.task_written import WRITTEN

TASKS: dict[str, Task] = {**CHOICES, **SUPERGLUE, **WRITTEN}
"""Every task by its name."""
