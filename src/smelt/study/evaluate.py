"""The evaluation of one trained cell: zero-shot tasks and fine-tuning, written as they are done."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smelt.study.settings import Evaluation
from smelt.study.store import read, write


def evaluate_cell(folder: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Measure what is lacking, and write it to `FOLDER.json` after every task.

    Args:
        folder: a finished run.
        evaluation: which tasks, how many items.

    Returns:
        All that was ever measured: `tasks` and `finetune`, by name.
    """
    path = folder.with_name(folder.name + ".json")
    found: dict[str, Any] = {"tasks": {}, "finetune": {}} | (read(path) or {})
    model: Any = None
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for task in evaluation.tasks:
        if task in found["tasks"]:
            continue
        from smelt.evaluate.tasks import evaluate_tasks

        if model is None:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        begin = time.perf_counter()
        scores = evaluate_tasks(
            model, tokenizer, [task], limit=evaluation.limit, batch_size=evaluation.batch_size
        )
        found["tasks"][task] = {
            "scores": [dataclasses.asdict(score) for score in scores],
            "seconds": round(time.perf_counter() - begin, 1),
        }
        write(path, found)
    if evaluation.finetune is not None:
        _finetune(folder, evaluation.finetune, found, path)
    write(path, found)
    return found


def _finetune(folder: Path, settings: Any, found: dict[str, Any], path: Path) -> None:
    from smelt.study.finetune import finetune

    for name in settings.names():
        if name not in found["finetune"]:
            task, _, seed = name.rpartition("/seed-")
            found["finetune"][name] = finetune(folder, task, settings, seed=int(seed))
            write(path, found)
