"""lm-evaluation-harness's own tasks by their names, where their data can be had.

A name of ours wins over the harness's; `lm_eval:NAME` is always the harness's.
"""

import contextlib
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from smelt.errors import RecipeError, SmeltError
from smelt.evaluate.aggregates import Columns
from smelt.evaluate.outcomes import Outcome


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness with its data, and which of its items are asked."""

    name: str
    made: Any  # its ConfigurableTask
    places: tuple[int, ...]  # of the items
    size: int  # items that there are
    sha256: str  # of the items that are asked
    shots: int

    def __str__(self) -> str:
        """As a person names it."""
        text = f"lm-evaluation-harness's {self.name}"
        if len(self.places) < self.size:
            text += f" (subset: {len(self.places):,} of {self.size:,} items)"
        return text + (f", {self.shots} solved examples before each" if self.shots else "")


def find_tasks(
    names: Sequence[str],
    *,
    prefix: str,
    own: Sequence[str],
    limit: int | None,
    shots: int | None,
    execute_code: bool,
    task_folder: str | Path | None,
) -> dict[str, list[HarnessTask]]:
    """The tasks behind names, groups and tags; the data of each is loaded.

    Raises:
        RecipeError: no such task, no such folder, a task that runs code where that is not allowed.
        SmeltError: a task's data cannot be had here.
    """
    if task_folder is not None and not Path(task_folder).is_dir():
        raise RecipeError(f"{task_folder}: there is no such folder of tasks.")
    if not names:
        return {}
    folder = None if task_folder is None else Path(task_folder)
    found: dict[str, list[HarnessTask]] = {}
    managers: dict[bool, Any] = {}
    for name in names:
        plain = name.removeprefix(prefix)
        is_own = folder is not None and _is_named(plain, folder)
        if not is_own and not _is_named(plain, _harness_folder()):
            raise RecipeError(
                f"there is no task {name!r}. The tasks are: {', '.join(own)}; and those of "
                "lm-evaluation-harness by their own names (lm-eval ls tasks), where their data can "
                "be had."
            )
        if is_own not in managers:
            managers[is_own] = _manager(folder, with_defaults=not is_own)
        if plain not in managers[is_own].all_tasks:
            raise RecipeError(
                f"there is no task {name!r}: lm-evaluation-harness has files that hold the name, "
                "but no task, group or tag that is called so."
            )
        found[name] = [
            _ready(title, made, limit, shots, execute_code)
            for title, made in _load(managers[is_own], plain).items()
        ]
    return found


def _harness_folder() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "read_items looks for the harness first"
    return Path(spec.origin).parent / "tasks"


def _is_named(name: str, folder: Path) -> bool:
    """Whether a YAML file holds the name: 14,000 files are sooner searched than parsed."""
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    files = (path for path in folder.rglob("*") if path.name.endswith(("yaml", "yml")))
    return any(word.search(path.read_text(encoding="utf-8", errors="replace")) for path in files)


def _manager(folder: Path | None, *, with_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    from smelt.evaluate.task_scorer import quiet, unheard

    path = None if folder is None else str(folder)
    try:
        with quiet(), unheard():
            return TaskManager(include_path=path, include_defaults=with_defaults)
    except Exception as error:  # a YAML file of the user's that does not parse
        told = " ".join(str(error).split())
        raise RecipeError(
            f"{folder}: a file of it cannot be read as a task of lm-evaluation-harness "
            f"({type(error).__name__}: {told[:300]})."
        ) from None


def _load(manager: Any, name: str) -> Mapping[str, Any]:
    """The tasks of a name. Anything may go wrong where somebody else's task fetches its data."""
    from smelt.evaluate.task_scorer import quiet, unheard

    try:
        with quiet(), unheard(), contextlib.redirect_stdout(io.StringIO()):
            tasks: Mapping[str, Any] = manager.load(name)["tasks"]
    except Exception as error:  # their code, their libraries, their network
        told = " ".join(str(error).split())
        raise SmeltError(
            f"lm-evaluation-harness's task {name} cannot be loaded here: "
            f"{type(error).__name__}: {told[:300]}. Its data set has to be on this machine (the "
            "cache of the datasets library) or within reach; or describe a task over a file of "
            "your own in a folder of YAML files, and name it with --task-folder."
        ) from None
    return tasks


def _ready(
    name: str, made: Any, limit: int | None, shots: int | None, execute_code: bool
) -> HarnessTask:
    if getattr(made, "UNSAFE_CODE", False):
        allowed = "is not sandboxed by the harness" if execute_code else "is off"
        raise RecipeError(
            f"lm-evaluation-harness's {name} executes what the model writes, which {allowed}. Of "
            "these tasks smelt runs its own humaneval alone, with --execute-code."
        )
    kinds = {"loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until"}
    if made.OUTPUT_TYPE not in kinds or getattr(made, "MULTIMODAL", False):
        raise RecipeError(
            f"lm-evaluation-harness's {name} asks for more than text ({made.OUTPUT_TYPE}), which "
            "smelt does not measure."
        )
    if shots is not None:
        made.set_config("num_fewshot", shots)
    docs = made.eval_docs
    size = len(docs)
    count = size if limit is None else min(limit, size)
    places = tuple(i * size // count for i in range(count))
    digest = hashlib.sha256()
    for i in places:
        digest.update(json.dumps(docs[i], sort_keys=True, default=str).encode())
    own = int(made.get_config("num_fewshot") or 0)
    return HarnessTask(name, made, places, size, digest.hexdigest(), own)


def ask_harness(harness: ModuleType, scorer: Any, task: HarnessTask, seed: int) -> list[Outcome]:
    """A model's answers to one of the harness's tasks, by its own metrics."""
    asked = harness.ask_all(scorer, task.made, seed, task.places)
    rules = task.made.aggregation()
    found = []
    for metric, said in asked.said.items():
        rule = rules.get(metric.partition(",")[0])
        aggregate, columns = _columns(rule, said)
        is_choice = task.made.OUTPUT_TYPE == "multiple_choice"
        found.append(
            Outcome(
                task=task.name,
                metric=metric,
                aggregate=aggregate,
                columns=columns,
                names=tuple(str(place) for place in task.places),
                source=str(task),
                sha256=task.sha256,
                chance=_chance(task) if is_choice and metric in ("acc", "acc_norm") else None,
                num_cut=sum(asked.is_cut),
                harness={
                    "lm_eval": harness.VERSION,
                    "task_version": str(task.made.VERSION),
                    "shots": task.shots,
                    "prompts": asked.prompts,
                },
                told=None if aggregate else float(rule(said)) if rule else math.nan,
            )
        )
    return found


def _columns(rule: Any, said: Sequence[Any]) -> tuple[str, Columns]:
    """How ours spells one of the harness's aggregations; "": it has no such thing."""
    from lm_eval.api import metrics

    known = {
        metrics.mean: "mean",
        metrics.perplexity: "perplexity",
        metrics.weighted_perplexity: "weighted perplexity",
        metrics.bits_per_byte: "bits",
    }
    name = known.get(rule, "")
    if not name:
        return "", np.zeros((len(said), 0))
    table = np.array(said, dtype=np.float64)
    return name, table.reshape(len(said), -1)


def _chance(task: HarnessTask) -> float:
    docs = task.made.eval_docs
    each = [1 / len(task.made.doc_to_choice(docs[place])) for place in task.places]
    return sum(each) / len(each)
