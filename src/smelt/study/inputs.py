"""What a study reads, looked at before anything runs: a job may take an hour to find out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smelt.recipe import CalibrationTask
from smelt.settings import Settings
from smelt.study.settings import Finetune
from smelt.text.sources import TextSource, check_source, parse_source
from smelt.text2text.files import data_folder
from smelt.train.settings import TaskSettings


def check_inputs(recipes: Iterable[Settings]) -> None:
    """Texts and tasks that recipes name anywhere have to be there.

    Raises:
        RecipeError: an environment variable that is not set, no folder of task files, a zero-shot
            task that is none.
        SmeltError: text or items that are not there, tasks without lm-evaluation-harness.
    """
    named = _Named()
    for recipe in recipes:
        named.look(recipe)
    for source in named.texts:
        check_source(source)
    if named.has_task_files:
        data_folder()
    if named.zero_shot:
        from smelt.evaluate.tasks import read_items

        read_items(list(named.zero_shot), limit=1)


@dataclass
class _Named:
    """What was named, each once, in order."""

    texts: dict[TextSource, None] = field(default_factory=dict)
    zero_shot: dict[str, None] = field(default_factory=dict)
    has_task_files: bool = False

    def look(self, value: Any, setting: str = "") -> None:
        if isinstance(value, TextSource):
            self.texts[value] = None
        elif isinstance(value, (TaskSettings, CalibrationTask, Finetune)):
            self.has_task_files = True
        elif isinstance(value, Settings):
            for name in type(value).model_fields:
                self.look(getattr(value, name), name)
        elif isinstance(value, Mapping):
            for one in value.values():
                self.look(one, setting)
        elif isinstance(value, (tuple, list)):
            for one in value:
                self.look(one, setting)
        elif isinstance(value, str) and setting == "text":
            self.texts[parse_source(value)] = None
        elif isinstance(value, str) and setting == "tasks":
            self.zero_shot[value] = None
        elif isinstance(value, str) and setting in ("task", "benchmark"):
            self.has_task_files = True
