"""lm-evaluation-harness's model around one in memory: its log-likelihoods and its generation.

One of the two modules that import lm_eval, which is heavy and comes with the extra `eval`; the
other is `task_harness`. Prompts of its own tasks are looked up where they are used.
"""

import contextlib
import copy
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

from smelt.errors import CheckpointError

_LOGITS = 1 << 28
"""Numbers in the logits of one batch, at most: 1 GiB, and the harness makes them twice."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Question and answer as text, and the tokens of each."""


class Scorer(HFLM):  # type: ignore[misc]
    """The harness's model of a causal language model that is in memory already.

    It sorts requests by length, pads them on the right and cuts what is longer than the model's
    positions on the left. Four things differ: an answer longer than the positions is scored in
    windows, as the harness does with long texts, where it would stop; a generated answer has half
    of the positions at most, where it would stop too; a batch is smaller where its logits would
    not fit; and it is quiet.
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
        self.most_tokens: int | None = None  # of an answer, where fewer than asked for fit
        self.told: Callable[[int, int], None] = lambda done, total: None  # after every batch
        self._done = self._total = 0

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self._check_tokens(requests)
        kwargs |= {"override_bs": None, "disable_tqdm": True}
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
            raise self._mismatch(largest)

    def _mismatch(self, token: int) -> CheckpointError:
        return CheckpointError(
            f"The tokenizer gives token id {token}, the model has {self.vocabulary} tokens. "
            "Tokenizer and weights are of different models."
        )

    def _windows(self, text: Any, before: list[int], after: list[int]) -> list[Request]:
        """An answer longer than the positions, in pieces, each behind at least one token."""
        windows = get_rolling_token_windows(after, before[-1], self.max_length, context_len=1)
        return [(text, *make_disjoint_window(window)) for window in windows]

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self._tell(len(inps))
        return logits

    def _tell(self, num: int) -> None:
        self._done += num
        self.told(self._done, self._total)

    def loglikelihood_rolling(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Of whole texts, in windows; those of all texts are sorted and batched together."""
        self.batch_size_per_gpu = 1 << 62  # all windows in one call, which makes its own batches
        kwargs["disable_tqdm"] = True
        found = super().loglikelihood_rolling(requests, *args, **kwargs)
        self.is_cut = [False] * len(requests)
        return found

    def generate_until(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """What the model writes after each question, until one of the marks that end it."""
        self.batch_size_per_gpu = self.largest_batch
        self._done, self._total = 0, len(requests)
        self.is_cut, fitted = [], []
        for request in requests:
            text, asked = request.args
            most = int(asked.get("max_gen_toks", self.max_gen_toks))
            fits = min(most, self.max_length // 2)
            self.most_tokens = fits if fits < most else self.most_tokens
            self.is_cut.append(len(self.tok_encode(text)) > self.max_length - fits)
            fitted.append(replace(request, arguments=(text, {**asked, "max_gen_toks": fits})))
        return super().generate_until(fitted, *args, **kwargs)

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        largest = int(context.max())
        if largest >= self.vocabulary:
            raise self._mismatch(largest)
        found = super()._model_generate(context, *args, **kwargs)
        self._tell(len(context))
        return found


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


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Within: the harness draws no bars of its own."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
