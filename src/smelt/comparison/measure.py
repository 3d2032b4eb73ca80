"""What a model of a comparison is worth: every metric with a value for each unit, for pairing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from smelt.checkpoint.inputs import make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.comparison.work_settings import Ask
from smelt.compress.inputs import read_text
from smelt.evaluate.perplexity import measure as measure_perplexity
from smelt.evaluate.text2text import Asked, Benchmark, ask_benchmark, read_benchmarks
from smelt.recipe import CalibrationRecipe
from smelt.text2text.items import Answer, Item
from smelt.text2text.metrics import POSITIVE
from smelt.text2text.tasks import TASKS

LOWER = "nats per token"
"""Metrics of this beginning are better when lower."""


def measure(folder: str | Path, ask: Ask) -> dict[str, Any]:
    """Every metric by name: value, standard error, n, levels without a model, values by unit.

    The mean of `values` is the metric. Where it is no mean by nature (F1 over all items, nats per
    token), values are linearised: the value and the unit's first-order part in it.

    Returns:
        `metrics`, and `answers` by item where there are any.
    """
    if ask.benchmark is not None:
        return _benchmark(folder, ask, ask.benchmark)
    return _text(folder, ask)


def _benchmark(folder: str | Path, ask: Ask, task: str) -> dict[str, Any]:
    (asked,) = read_benchmarks([task], part=ask.part, limit=ask.limit)
    checkpoint = Checkpoint.open(folder)
    model = load_model(checkpoint).float()
    found = ask_benchmark(
        model, checkpoint.tokenizer, asked, max_input=ask.max_input, batch_size=ask.batch_size
    )
    outcomes = found.outcomes()
    metrics = outcomes["metrics"]
    if TASKS[task].kind in {"classify", "judge"}:
        for name, one in metrics.items():
            if name.startswith("F1"):
                one["values"] = _f1_values(one, asked, found)
    return {
        "items": found.source,
        "sha256": found.sha256,
        "share_of_inputs_cut": found.share_cut,
        "metrics": metrics,
        "answers": outcomes["answers"],
    }


def _f1_values(one: Mapping[str, Any], asked: Asked, found: Benchmark) -> dict[str, float]:
    items = asked.items.items
    units = [item.name if item.name in one["values"] else item.group for item in items]
    return f1_parts(items, found.answers, units, one["value"])


def f1_parts(
    items: Sequence[Item], answers: Sequence[Answer], groups: Sequence[str], value: float
) -> dict[str, float]:
    """F1 of "yes" by unit: the value, and to first order what the unit adds to it.

    F1 = 2 both / (said + so). The mean over units is F1; their spread over √n is its standard error
    by the delta method.

    Args:
        items: all of them.
        answers: to them.
        groups: the unit of each.
        value: F1.
    """
    counts: dict[str, list[int]] = {}
    for item, answer, group in zip(items, answers, groups, strict=True):
        said, is_so = answer.choice == POSITIVE, item.label == POSITIVE
        one = counts.setdefault(group, [0, 0])
        one[0] += 2 * (said and is_so)
        one[1] += said + is_so
    scale = sum(total for _, total in counts.values()) / len(counts)
    if not scale:
        return dict.fromkeys(counts, value)
    return {
        group: value + (both - value * total) / scale for group, (both, total) in counts.items()
    }


# --- causal models -------------------------------------------------------------------------------


def _text(folder: str | Path, ask: Ask) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder)
    metrics, hashes = {}, []
    for source in ask.text:
        recipe = CalibrationRecipe(
            text=(source,), num_tokens=ask.num_tokens, sequence_length=ask.sequence_length
        )
        blocks = read_text(checkpoint, recipe)
        batches = make_batches(checkpoint, blocks, ask.batch_size)
        found = measure_perplexity(checkpoint, batches, blocks.num_bytes)
        own = found.sequences
        used = torch.where(own.count > 0)[0].tolist()
        scale = len(used) / own.num_tokens
        values = {str(i): float(own.total[i]) * scale for i in used}
        metrics[f"{LOWER}, {source}"] = {
            "value": found.nats,
            "standard_error": found.standard_error,
            "n": len(used),
            "unit": "sequences",
            "without_a_model": {},
            "values": values,
        }
        hashes.append(blocks.sha256)
    return {
        "items": ", ".join(ask.text),
        "sha256": " ".join(hashes),
        "metrics": metrics | _tasks(checkpoint, ask),
    }


def _tasks(checkpoint: Checkpoint, ask: Ask) -> dict[str, Any]:
    """Zero-shot scores: no values by item, so seeds alone say how they differ."""
    if not ask.tasks:
        return {}
    from smelt.evaluate.tasks import evaluate_tasks

    model = load_model(checkpoint).float()
    scores = evaluate_tasks(
        model, checkpoint.tokenizer, ask.tasks, limit=ask.limit, batch_size=ask.batch_size
    )
    return {
        f"{score.task} {score.metric}": {
            "value": score.value,
            "standard_error": score.standard_error,
            "n": score.n,
            "unit": "items",
            "without_a_model": {} if score.chance is None else {"chance": score.chance},
            "values": {},
        }
        for score in scores
        if ":" not in score.task
    }


def is_lower_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.startswith((LOWER, "perplexity"))
