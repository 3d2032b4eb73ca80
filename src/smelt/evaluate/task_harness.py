"""lm-evaluation-harness on our items: its prompts, log-likelihoods, metrics and standard errors.

The only module that imports lm_eval, which is heavy and comes with the extra `eval`.
"""

import contextlib
import copy
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from lm_eval.api.metrics import mean, mean_stderr, perplexity
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

from smelt.errors import CheckpointError
from smelt.evaluate.task_table import Row, Task

_LOGITS = 1 << 28
"""Numbers in the logits of one batch, at most: 1 GiB, and the harness makes them twice."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""Question and answer as text, and the tokens of each."""


class Scorer(HFLM):  # type: ignore[misc]
    """The harness's model of a causal language model that is in memory already.

    It sorts requests by length, pads them on the right and cuts what is longer than the model's
    positions on the left. Three things differ: an answer longer than the positions is scored in
    windows, as the harness does with long texts, where it would stop; a batch is smaller where its
    logits would not fit; and it is quiet.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int) -> None:
        if tokenizer.pad_token_id is None:
            tokenizer = copy.deepcopy(tokenizer)  # it will be given one
        with quiet():
            super().__init__(
                pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size
            )
        self.largest_batch = batch_size
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.is_cut: list[bool] = []  # of the requests last asked: the question lost its beginning
        self.told: Callable[[int, int], None] = lambda done, total: None  # after every batch
        self._done = self._total = 0

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self._check_tokens(requests)
        longest = self.max_length
        self.is_cut = [len(before) + len(after) > longest + 1 for _, before, after in requests]
        pieces = [
            [one] if len(one[2]) <= longest else self._windows(*one)  # in windows: a long answer
            for one in requests
        ]
        flat = [piece for some in pieces for piece in some]
        width = min(longest, max(len(before) + len(after) for _, before, after in flat))
        fitting = _LOGITS // (width * self.vocabulary)
        self.batch_size_per_gpu = max(1, min(self.largest_batch, fitting))
        self._done, self._total = 0, len(flat)
        found = iter(super()._loglikelihood_tokens(flat, *args, **kwargs))
        self.told(len(flat), len(flat))  # it asks once what several requests share
        sums = []
        for some in pieces:
            scores = [next(found) for _ in some]
            sums.append((sum(one for one, _ in scores), all(best for _, best in scores)))
        if any(math.isnan(one) for one, _ in sums):
            raise CheckpointError(
                "The model's outputs are NaN. Its weights are damaged, or its numbers do not fit "
                f"{str(self.model.dtype).removeprefix('torch.')}."
            )
        return sums

    def _check_tokens(self, requests: Sequence[Request]) -> None:
        largest = max(max(before + after) for _, before, after in requests)
        if largest >= self.vocabulary:
            raise CheckpointError(
                f"The tokenizer gives token id {largest}, the model has {self.vocabulary} tokens. "
                "Tokenizer and weights are of different models."
            )

    def _windows(self, text: tuple[str, str], before: list[int], after: list[int]) -> list[Request]:
        """An answer longer than the positions, in pieces, each behind at least one token."""
        windows = get_rolling_token_windows(after, before[-1], self.max_length, context_len=1)
        return [(text, *make_disjoint_window(window)) for window in windows]

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self._done += len(inps)
        self.told(self._done, self._total)
        return logits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within: the harness logs errors only (it warns of every item that it cuts)."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Asked:
    """What a model said to the items of a task."""

    values: dict[str, list[float]]  # of every item, by metric, before the harness's aggregation
    is_cut: list[bool]  # of every item: its beginning did not fit the model's positions


def ask(scorer: Scorer, name: str, task: Task, rows: Sequence[Row], seed: int) -> Asked:
    """The model's answers to all items, each judged by the harness.

    Args:
        seed: the harness's own; a zero-shot task draws nothing with it.

    Raises:
        CheckpointError: the model's outputs are not finite.
    """
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # where it draws a bar of its own
        made = ConfigurableTask(config=_config(name, task, rows))
        made.set_fewshot_seed(seed)
        made.build_all_requests()
    with quiet():
        answers = scorer.loglikelihood(made.instances, disable_tqdm=True)
    by_item: list[list[tuple[float, bool]]] = [[] for _ in rows]
    is_cut = [False] * len(rows)
    for request, answer, cut in zip(made.instances, answers, scorer.is_cut, strict=True):
        by_item[request.doc_id].append(answer)
        is_cut[request.doc_id] |= cut
    judged = [made.process_results(*both) for both in zip(made.eval_docs, by_item, strict=True)]
    return Asked({m: [float(one[m]) for one in judged] for m in task.metrics}, is_cut)


def summary(metric: str, values: Sequence[float]) -> tuple[float, float | None]:
    """The harness's aggregate of the items, and its standard error; None: of one item.

    The harness bootstraps the error of a perplexity; here it is that of the mean log-likelihood
    times the perplexity, as everywhere in smelt.
    """
    error = float(mean_stderr(values)) if len(values) > 1 else None
    if metric != "perplexity":
        return float(mean(values)), error
    try:
        value = float(perplexity(values))
    except OverflowError:
        value = math.inf
    return value, None if error is None else error * value


def _config(name: str, task: Task, rows: Sequence[Row]) -> dict[str, Any]:
    """The task as the harness's own configuration."""
    return {
        "task": name,
        "custom_dataset": lambda **_: {task.split: datasets.Dataset.from_list(rows)},
        "test_split": task.split,
        "num_fewshot": 0,
        "output_type": "multiple_choice" if task.choices else "loglikelihood",
        "doc_to_text": task.ask,
        "doc_to_choice": task.choices,
        "doc_to_target": task.target,
        "metric_list": [
            {
                "metric": metric,
                "aggregation": "perplexity" if metric == "perplexity" else "mean",
                "higher_is_better": metric != "perplexity",
            }
            for metric in task.metrics
        ],
    }
