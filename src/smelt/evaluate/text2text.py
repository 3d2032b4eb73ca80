"""Benchmarks as text to text: an encoder–decoder model's own answers, and what they are worth.

Choices are scored, answers are generated; nothing is read off a forward that was shown the right
answer. docs/tasks.md has the protocol.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import Progress
from smelt.errors import CheckpointError
from smelt.evaluate.results import Result, Setting, record
from smelt.outputs import write_text
from smelt.text.spans import IGNORED
from smelt.text2text.baselines import trivial
from smelt.text2text.encode import Encoded, Encoder
from smelt.text2text.files import Items, Part, read_items
from smelt.text2text.items import Answer
from smelt.text2text.metrics import Measured, Score, measure
from smelt.text2text.tasks import TASKS

BATCH_SIZE = 32
VERSION = 1
"""Of the file of outcomes."""


@dataclass(frozen=True)
class Asked:
    """The items of a benchmark that are asked, and what rules without a model reach on them."""

    items: Items
    levels: dict[str, dict[str, float]]  # by metric, by rule

    @property
    def task(self) -> str:
        """The benchmark's name."""
        return self.items.task


@dataclass(frozen=True)
class Benchmark:
    """A model's answers to a benchmark."""

    task: str
    source: str  # which items, as a person names them
    sha256: str  # of the file they are of
    answers: tuple[Answer, ...]  # in the order of the items
    names: tuple[str, ...]  # of the items
    measured: tuple[Measured, ...]
    levels: dict[str, dict[str, float]]
    share_cut: float  # of the inputs: something did not fit

    @property
    def scores(self) -> list[Score]:
        """Every metric with its standard error and the levels of the rules."""
        return [
            replace(one.score(), trivial=self.levels.get(one.metric, {})) for one in self.measured
        ]

    def records(
        self, checkpoint: Checkpoint, *, seed: int = 0, device: str = "cpu"
    ) -> list[Result]:
        """The metrics as named records; chance is the best of the rules without a model."""
        cut = f", {self.share_cut:.1%} of the inputs cut" if self.share_cut else ""
        setting = Setting((self.source + cut,), self.sha256, seed, device)
        return [
            record(
                checkpoint,
                setting,
                task=self.task,
                metric=score.metric,
                value=score.value,
                n=score.n,
                standard_error=score.standard_error,
                chance=max(score.trivial.values(), default=None),
            )
            for score in self.scores
        ]

    def outcomes(self) -> dict[str, Any]:
        """All that paired comparisons need: every metric's value by unit, and every answer."""
        return {
            "task": self.task,
            "items": self.source,
            "sha256": self.sha256,
            "share_of_inputs_cut": self.share_cut,
            "metrics": {
                score.metric: {
                    "value": score.value if math.isfinite(score.value) else None,
                    "standard_error": score.standard_error,
                    "n": score.n,
                    "unit": score.unit,
                    "without_a_model": dict(score.trivial),
                    "values": dict(one.values),
                }
                for one, score in zip(self.measured, self.scores, strict=True)
            },
            "answers": {
                name: answer.text if not answer.scores else [round(s, 5) for s in answer.scores]
                for name, answer in zip(self.names, self.answers, strict=True)
            },
        }


def read_benchmarks(
    tasks: Sequence[str],
    *,
    part: Part = "report",
    limit: int | None = None,
    data: str | Path | None = None,
) -> list[Asked]:
    """The items of benchmarks, read once for any number of models.

    Args:
        tasks: names in `smelt.text2text.tasks.TASKS`.
        part: `report` for a number that is told, `choose` for anything that is chosen by it.
        limit: at most so many items of each, evenly spaced; of grouped ones, so many groups.
        data: the folder of task files; None: the one that SMELT_DATA names.
    """
    found = []
    for name in dict.fromkeys(tasks):
        items = read_items(name, part, data=data, limit=limit)
        train = read_items(name, "train", data=data)
        found.append(Asked(items, trivial(TASKS[name], train.items, items.items)))
    return found


def check_text2text(model: PreTrainedModel) -> None:
    """Raise CheckpointError unless the model reads one text and writes another."""
    if not model.config.is_encoder_decoder or not model.can_generate():
        raise CheckpointError(
            f"{type(model).__name__} is no encoder–decoder language model. Benchmarks are asked as "
            "text to text: give a Switch or T5-like checkpoint, or ask a causal one with --tasks."
        )
    if model.config.decoder_start_token_id is None:
        raise CheckpointError(
            f"config.json of this {type(model).__name__} has no decoder_start_token_id: nothing "
            "can be generated. Add it (T5 and Switch: the padding token)."
        )


def ask_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    *,
    max_input: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Benchmark:
    """The model's answers to all items. It is left as it was, in evaluation mode or not.

    Choices: the sum of the log-probabilities of the choice's tokens, its end among them, so that
    choices of unequal lengths are compared as whole answers. Generated answers: greedy, cached, as
    long as a target may be.

    Args:
        model: an encoder–decoder, fine-tuned on the task or not.
        tokenizer: its own.
        asked: the items.
        max_input: tokens of an input; None: the task's own.
        batch_size: items at a time; changes rounding only.
        progress: told how far it is.
    """
    check_text2text(model)
    task = TASKS[asked.task]
    items = asked.items.items
    encoder = Encoder(tokenizer, max_input=max_input or task.max_input, max_target=task.max_target)
    encoded = encoder.encode(items, for_training=False)
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    try:
        for places in _batches(encoded, batch_size):
            batch = [encoded[place] for place in places]
            answer = _score if batch[0].item.choices else _generate
            answers |= zip(places, answer(model, encoder, batch), strict=True)
            if progress is not None:
                progress(asked.task, len(answers), len(items))
    finally:
        model.train(was_training)
    given = tuple(answers[place] for place in range(len(items)))
    return Benchmark(
        asked.task,
        str(asked.items),
        asked.items.sha256,
        given,
        tuple(item.name for item in items),
        tuple(measure(task, items, given)),
        asked.levels,
        sum(one.is_cut for one in encoded) / len(encoded),
    )


def _batches(encoded: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """Places of items of about the same length, the longest first."""
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].input_ids), i))
    for at in range(0, len(order), size):
        yield order[at : at + size]


def _inputs(model: PreTrainedModel, batch: Sequence[Encoded]) -> dict[str, Tensor]:
    rows = [torch.tensor(one.input_ids) for one in batch]
    pad = int(model.config.pad_token_id or 0)
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


@torch.no_grad()
def _score(model: PreTrainedModel, encoder: Encoder, batch: Sequence[Encoded]) -> list[Answer]:
    """The log-probability of every choice of every item."""
    inputs = _inputs(model, batch)
    read: Any = model.get_encoder()(**inputs)
    scores: list[list[float]] = [[] for _ in batch]
    choices = [encoder.choices(one.item) for one in batch]
    pad, start = int(model.config.pad_token_id or 0), int(model.config.decoder_start_token_id)
    for number in range(max(map(len, choices))):
        rows = [torch.tensor(own[min(number, len(own) - 1)]) for own in choices]
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(model.device)
        before = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) == IGNORED, pad)
        before[:, 0] = start
        logits = model(
            encoder_outputs=read,
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=before,
            decoder_attention_mask=(labels != IGNORED).long(),
            use_cache=False,
        ).logits.float()
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        sums = -nats.view(labels.shape).double().sum(1)
        for own, found, score in zip(choices, scores, sums.tolist(), strict=True):
            if number < len(own):
                found.append(score)
    _check_finite(scores)
    return [Answer(tuple(found)) for found in scores]


def _check_finite(scores: Sequence[Sequence[float]]) -> None:
    if not all(math.isfinite(score) for found in scores for score in found):
        raise CheckpointError(
            "The model's outputs are NaN or infinite: its weights are damaged, or its type is too "
            "narrow. Look at them with smelt inspect --verify."
        )


@torch.no_grad()
def _generate(model: PreTrainedModel, encoder: Encoder, batch: Sequence[Encoded]) -> list[Answer]:
    """What the model writes, token by token, until it ends."""
    inputs = _inputs(model, batch)
    begin = torch.tensor([[int(model.config.decoder_start_token_id), *encoder.mark]])
    generate: Any = model.generate
    written = generate(
        **inputs,
        decoder_input_ids=begin.repeat(len(batch), 1).to(model.device),
        max_new_tokens=encoder.max_target - len(encoder.mark),
        num_beams=1,
        do_sample=False,
        use_cache=True,
        eos_token_id=encoder.end,
        pad_token_id=encoder.end,
    )
    return [Answer(text=encoder.text(row)) for row in written[:, begin.shape[1] :].tolist()]


def save_outcomes(benchmarks: dict[str, list[Benchmark]], path: str | Path) -> None:
    """Write every answer and every value as JSON: by checkpoint, then by task."""
    value = {
        "version": VERSION,
        "checkpoints": {
            name: {one.task: one.outcomes() for one in found} for name, found in benchmarks.items()
        },
    }
    write_text(Path(path), json.dumps(value, indent=1, ensure_ascii=False) + "\n")
