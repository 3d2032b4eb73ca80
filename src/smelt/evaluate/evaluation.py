"""Everything that `smelt evaluate` measures of some checkpoints: a text, an original, tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from smelt.checkpoint.inputs import make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.compress.inputs import read_text
from smelt.compress.pipeline import Stages, silent
from smelt.evaluate.compare import Compared, compare
from smelt.evaluate.fidelity import Fidelity, fidelity
from smelt.evaluate.harness_tasks import HarnessTask
from smelt.evaluate.item_files import Answers, answers_of
from smelt.evaluate.last import Spread
from smelt.evaluate.outcomes import TaskScore
from smelt.evaluate.paired import Paired
from smelt.evaluate.results import Result, Setting
from smelt.evaluate.task_files import Items
from smelt.evaluate.tasks import ask_outcomes
from smelt.evaluate.text2text import Asked, Benchmark, ask_benchmark
from smelt.recipe import CalibrationRecipe


@dataclass(frozen=True)
class Evaluation:
    """Checkpoints measured on one text and on tasks, and held against their original."""

    compared: list[Compared] = field(default_factory=list)  # empty: tasks alone were asked for
    fidelity: list[Fidelity | None] = field(default_factory=list)
    """Of each that was compared; None: it is the original, or none was given."""
    results: list[Result] = field(default_factory=list)  # every number, with what repeats it
    tasks: dict[str, list[TaskScore]] = field(default_factory=dict)  # by the checkpoint's name
    benchmarks: dict[str, list[Benchmark]] = field(default_factory=dict)  # likewise
    answers: list[Answers] = field(default_factory=list)  # to tasks, by item, of each checkpoint
    paired: list[Paired] = field(default_factory=list)  # each less the first, where asked for
    spreads: list[Spread] = field(default_factory=list)  # over the last checkpoints, likewise

    def joined(self, more: "Evaluation") -> "Evaluation":
        """This one and another, of other measures or of other checkpoints."""
        return Evaluation(
            compared=self.compared + more.compared,
            fidelity=self.fidelity + more.fidelity,
            results=self.results + more.results,
            tasks=self.tasks | more.tasks,
            benchmarks=self.benchmarks | more.benchmarks,
            answers=self.answers + more.answers,
            paired=self.paired + more.paired,
            spreads=self.spreads + more.spreads,
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row per checkpoint that was compared."""
        rows = []
        for one, near in zip(self.compared, self.fidelity, strict=True):
            row: dict[str, Any] = dict(one.row())
            if (bits := one.perplexity.bits_per_byte) is not None:
                error = one.perplexity.standard_error
                scale = bits / (one.perplexity.nats or 1.0)
                row["± se, bits"] = None if error is None else error * scale
            if near is not None:
                shares = [x.routing_agreement for x in near.layers]
                known = [share for share in shares if share is not None]
                row |= {
                    "KL": near.kl.mean,
                    "top-1 agreement": near.agreement.mean,
                    "routing agreement": sum(known) / len(known) if known else None,
                    "worst layer error": max(layer.error for layer in near.layers),
                }
            rows.append(row)
        return rows


def measure_text(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    recipe: CalibrationRecipe,
    *,
    original: Checkpoint | None = None,
    bits_per_byte_only: bool = False,
    device: str = "cpu",
    stages: Stages = silent,
) -> Evaluation:
    """The loss of all checkpoints on one text, and how near each stays to the original.

    Args:
        names: what to call the checkpoints.
        bits_per_byte_only: allow checkpoints of different tokenizers.
    """
    compared = compare(
        checkpoints,
        partial(read_text, recipe=recipe),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        bits_per_byte_only=bits_per_byte_only,
        device=device,
        stages=stages,
    )
    found = Evaluation([replace(one, name=name) for one, name in zip(compared, names, strict=True)])
    for one, checkpoint in zip(found.compared, checkpoints, strict=True):
        blocks = read_text(checkpoint, recipe)
        setting = Setting(recipe.text, blocks.sha256, recipe.seed, device)
        found.results.extend(one.perplexity.records(checkpoint, setting))
        if original is None or checkpoint.folder == original.folder:
            found.fidelity.append(None)
            continue
        near = fidelity(
            original,
            checkpoint,
            make_batches(checkpoint, blocks, recipe.batch_size, recipe.seed),
            device=device,
            seed=recipe.seed,
            progress=stages(f"{one.name} against {original.folder.name}"),
        )
        found.fidelity.append(near)
        found.results.extend(near.records(checkpoint, setting))
    return found


def measure_tasks(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    items: Sequence[Items | HarnessTask],
    *,
    seed: int = 0,
    device: str = "cpu",
    stages: Stages = silent,
) -> Evaluation:
    """The zero-shot scores of checkpoints, one whole model in memory at a time."""
    found = Evaluation()
    for checkpoint, name in zip(checkpoints, names, strict=True):
        outcomes = ask_outcomes(
            load_model(checkpoint, device),
            checkpoint.tokenizer,
            items,
            seed=seed,
            progress=stages(name),
        )
        scores = [one.score() for one in outcomes]
        found.tasks[name] = scores
        found.answers.append(answers_of(checkpoint, name, outcomes, device=device))
        found.results.extend(one.record(checkpoint, seed=seed, device=device) for one in scores)
    return found


def measure_benchmarks(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    asked: Sequence[Asked],
    *,
    max_input: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    stages: Stages = silent,
) -> Evaluation:
    """The answers of encoder–decoder checkpoints, one whole model in memory at a time."""
    found = Evaluation()
    for checkpoint, name in zip(checkpoints, names, strict=True):
        model = load_model(checkpoint, device)
        found.benchmarks[name] = [
            ask_benchmark(
                model, checkpoint.tokenizer, one, max_input=max_input, progress=stages(name)
            )
            for one in asked
        ]
        for one in found.benchmarks[name]:
            found.results.extend(one.records(checkpoint, seed=seed, device=device))
    return found
