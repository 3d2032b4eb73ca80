"""What was measured on the cells of a study, in rows: a variant at a point, with its seeds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smelt.errors import RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.settings import read_values
from smelt.study.cells import Cell, model_config, twins
from smelt.study.settings import StudyRecipe
from smelt.study.statistics import Summary, summary
from smelt.study.store import Store, evaluation_of, mean_nats, read
from smelt.train.settings import TrainRecipe


@dataclass(frozen=True)
class Run:
    """One trained cell."""

    cell: str
    learning_rate: float
    nats: float  # mean over the held-out sources, at the end
    by_source: Mapping[str, float]
    last: tuple[float, ...]  # nats of the last checkpoints, in order
    parameters: int
    tokens_per_second: float
    peak_memory_bytes: float
    evaluation: Mapping[str, Any]  # as `evaluate_cell` wrote it


@dataclass(frozen=True)
class Row:
    """A variant at a point of a part, with the seeds that are done."""

    id: str  # part/variant[/point]
    part: str
    variant: str
    recipe: TrainRecipe  # of its first seed
    runs: Mapping[int, Run]  # by seed
    asked: int  # seeds there will be
    decode: Mapping[int, float]  # batch → milliseconds per step
    is_twin: bool  # another row has these cells already

    @property
    def nats(self) -> dict[int, float]:
        """Held-out nats by seed."""
        return {seed: run.nats for seed, run in self.runs.items()}

    @property
    def loss(self) -> Summary:
        """Of `nats`."""
        return summary(list(self.nats.values()))

    @property
    def spread_of_last(self) -> float | None:
        """Standard deviation over the last checkpoints of a run, root mean square over seeds."""
        found = [summary(run.last).sd for run in self.runs.values()]
        squares = [sd**2 for sd in found if sd is not None]
        return math.sqrt(math.fsum(squares) / len(squares)) if squares else None

    @property
    def config(self) -> SaMoEConfig | None:
        """The model's configuration; None: another family, whose FLOPs are not known here."""
        try:
            return model_config(self.recipe)
        except RecipeError:
            return None

    @property
    def parameters(self) -> int:
        """As the trained model counts them."""
        return next(iter(self.runs.values())).parameters

    @property
    def flops_per_token(self) -> int | None:
        """Of a forward in the middle of a training sequence."""
        if self.config is None:
            return None
        return self.config.flops_per_token(self.recipe.sequence_length // 2)

    @property
    def tokens(self) -> int:
        """Trained on, repeats counted."""
        recipe = self.recipe
        return recipe.steps * recipe.batch_size * recipe.sequence_length

    @property
    def is_comparable_with(self) -> tuple[object, ...]:
        """Equal for rows whose losses may be compared: text, objective and training tokens."""
        recipe = self.recipe
        assert recipe.text is not None
        text = recipe.text.model_dump_json(exclude={"cache"})
        return (recipe.objective, recipe.tokenizer.model_dump_json(), text, self.tokens)


def gather(study: StudyRecipe, only: str | None = None) -> list[Row]:
    """The rows with at least one finished seed, in the order of the study."""
    store = Store(study.output)
    decode = read(store.folder / "decode.json") or {}
    groups: dict[str, list[tuple[Cell, Cell]]] = {}
    for cell, first in twins(study):
        if only in (None, cell.part):
            groups.setdefault(row_id(cell), []).append((cell, first))
    rows = []
    for name, pairs in groups.items():
        runs = {}
        for cell, first in pairs:
            found = _run(study, store, first)
            if found is not None:
                runs[cell.seed] = found
        if runs:
            cell = pairs[0][0]
            milliseconds: dict[str, float] = {}
            for _, first in pairs:
                milliseconds |= decode.get("milliseconds", {}).get(first.id, {})
            rows.append(
                Row(
                    id=name,
                    part=cell.part,
                    variant=cell.variant,
                    recipe=cell.recipe,
                    runs=runs,
                    asked=len(pairs),
                    decode={int(batch): value for batch, value in milliseconds.items()},
                    is_twin=all(cell.id != first.id for cell, first in pairs),
                )
            )
    return rows


def row_id(cell: Cell) -> str:
    """The cell's name without its seed."""
    return cell.id.rpartition("/")[0]


def _run(study: StudyRecipe, store: Store, cell: Cell) -> Run | None:
    training = store.training(cell.id)
    if training is None:
        return None
    evaluation = evaluation_of(study, cell.part)
    measured = store.evaluation(cell.id)
    return Run(
        cell=cell.id,
        learning_rate=read_rate(store, cell.id),
        nats=mean_nats(training["held_out"]),
        by_source={name: one["nats_per_token"] for name, one in training["held_out"].items()},
        last=tuple(mean_nats(one["held_out"]) for one in training.get("checkpoints", ())),
        parameters=training["parameters"],
        tokens_per_second=training["tokens_per_second"],
        peak_memory_bytes=training["peak_memory_bytes"],
        evaluation={
            "tasks": {t: v for t, v in measured.get("tasks", {}).items() if t in evaluation.tasks},
            "finetune": measured.get("finetune", {}) if evaluation.finetune else {},
        },
    )


def read_rate(store: Store, name: str) -> float:
    """The learning rate that a finished run had."""
    values = read_values(store.run(name) / "smelt" / "recipe.yaml", TrainRecipe)
    return float(values["learning_rate"])
