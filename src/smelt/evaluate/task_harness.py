"""lm-evaluation-harness on items: its prompts, its requests, its filters and its judgement."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from smelt.errors import RecipeError
from smelt.evaluate.task_kinds import Row, Task
from smelt.evaluate.task_metrics import METRICS
from smelt.evaluate.task_scorer import Scorer, quiet, unheard

__all__ = ["ConfigurableTask", "Scorer", "ask", "ask_all", "quiet"]

VERSION = version("lm_eval")


@dataclass
class Asked:
    """What a model said to the items of a task, as the harness judges it."""

    said: dict[str, list[Any]] = field(default_factory=dict)
    """Of every item, by metric ("exact_match,strict-match": after a filter), not aggregated."""
    is_cut: list[bool] = field(default_factory=list)  # of every item: its beginning did not fit
    prompts: str = ""  # SHA-256 of all that was asked
    most_tokens: int | None = None  # of generated answers, where fewer than asked for fit


def ask(
    scorer: Scorer,
    name: str,
    task: Task,
    rows: Sequence[Row],
    seed: int,
    *,
    shots: int = 0,
    examples: Sequence[Row] = (),
) -> Asked:
    """The model's answers to all items, each judged by the harness.

    Args:
        seed: of the examples that are drawn; without any, nothing is random.
        shots: solved examples before every question, from `examples`.

    Raises:
        CheckpointError: the model's outputs are not finite.
        RecipeError: there are fewer examples than shots.
    """
    found = Asked()
    digest = hashlib.sha256()
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(task.alike(row) if task.alike and shots else "", []).append(place)
    order: list[int] = []
    for kind, places in groups.items():
        alike = [row for row in examples if not kind or (task.alike and task.alike(row) == kind)]
        if len(alike) < shots:
            raise RecipeError(
                f"{name}{kind and f' ({kind})'}: {shots} examples are asked for, and there are "
                f"{len(alike)}. Ask for fewer shots."
            )
        with quiet(), unheard():
            made = ConfigurableTask(
                config=config(name, task, [rows[i] for i in places], shots, alike)
            )
        one = ask_all(scorer, made, seed)
        digest.update(one.prompts.encode())
        order += places
        found.is_cut += one.is_cut
        found.most_tokens = one.most_tokens
        for metric, said in one.said.items():
            found.said.setdefault(metric, []).extend(said)
    back = sorted(range(len(order)), key=order.__getitem__)
    found.said = {metric: [said[i] for i in back] for metric, said in found.said.items()}
    found.is_cut = [found.is_cut[i] for i in back]
    found.prompts = digest.hexdigest() if len(groups) > 1 else one.prompts
    return found


def ask_all(scorer: Scorer, made: Any, seed: int, samples: Sequence[int] | None = None) -> Asked:
    """The model's answers to the items of one of the harness's own task objects.

    Args:
        made: a task of the harness; it is left with the answers in it.
        samples: places of the items that are asked; None: all.
    """
    chosen = None if samples is None else set(samples)
    with quiet(), unheard():
        made.set_fewshot_seed(seed)
        made.build_all_requests(samples=chosen)
        docs = list(made.doc_iterator(samples=chosen))
    requests = made.instances
    kinds = {request.request_type for request in requests}
    scorer.most_tokens = None
    cut: list[bool] = [False] * len(docs)
    digest = hashlib.sha256()
    for kind in sorted(kinds):
        own = [request for request in requests if request.request_type == kind]
        asked = [request for request in own for _ in range(request.repeats)]
        for request in own:
            digest.update(json.dumps([kind, request.args], default=str).encode())
        with quiet():
            answers = getattr(scorer, kind)(asked, disable_tqdm=True)
        for request, answer, is_cut in zip(asked, answers, scorer.is_cut, strict=True):
            request.resps.append(answer)
            cut[request.doc_id] |= is_cut
    made.apply_filters()
    return Asked(_judged(made, docs), cut, digest.hexdigest(), scorer.most_tokens)


def _judged(made: Any, docs: Sequence[tuple[int, Any]]) -> dict[str, list[Any]]:
    """What the harness says of every item, by metric and filter."""
    by_item: dict[int, list[Any]] = {}
    for request in made.instances:
        by_item.setdefault(request.doc_id, []).append(request)
    found: dict[str, list[Any]] = {}
    for name in made.instances[0].filtered_resps:
        for place, doc in docs:
            requests = sorted(by_item[place], key=lambda request: request.idx)
            said = made.process_results(doc, [one.filtered_resps[name] for one in requests])
            for metric, value in said.items():
                key = metric if name == "none" else f"{metric},{name}"
                found.setdefault(key, []).append(value)
    return found


def config(
    name: str,
    task: Task,
    rows: Sequence[Row],
    shots: int = 0,
    examples: Sequence[Row] = (),
) -> dict[str, Any]:
    """The task as the harness's own configuration."""
    shown = "examples"
    data = {task.split: datasets.Dataset.from_list(_with_intro(task, rows))}
    made: dict[str, Any] = {
        "task": name,
        "test_split": task.split,
        "num_fewshot": shots,
        "output_type": task.output,
        "doc_to_text": task.ask,
        "doc_to_choice": task.choices,
        "doc_to_target": task.target,
        "process_results": task.judge,
        "metric_list": _metrics(task),
    }
    if shots:
        data[shown] = datasets.Dataset.from_list(_with_intro(task, examples))
        made["fewshot_config"] = {"split": shown, "sampler": "first_n" if task.first else "default"}
    if task.intro is not None:
        made["description"] = "intro"
    if task.until:
        made["generation_kwargs"] = {
            "until": list(task.until),
            "max_gen_toks": task.max_tokens,
            "do_sample": False,
            "temperature": 0.0,
        }
    if task.filters:
        made["filter_list"] = [dict(one) for one in task.filters]
    return made | {"custom_dataset": lambda **_: data}


def _with_intro(task: Task, rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [dict(row) | ({"intro": task.intro(row)} if task.intro else {}) for row in rows]


def _metrics(task: Task) -> list[dict[str, Any]]:
    """The harness's metrics behind ours; it aggregates none of them."""
    names = dict.fromkeys(METRICS[metric].asked for metric in task.metrics)
    return [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        | dict((task.options or {}).get(name, {}))
        for name in names
    ]
