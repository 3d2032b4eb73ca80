"""What a zero-shot task is: a file, how its items become questions, and what answers are worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
"""An item of a task, and `place`: where it stands among those that are asked."""

Output = Literal["loglikelihood", "multiple_choice", "loglikelihood_rolling", "generate_until"]
"""What lm-evaluation-harness asks of a model: see its `output_type`."""


@dataclass(frozen=True)
class Task:
    """How the items of a file become questions with a score.

    The functions are what lm-evaluation-harness knows as doc_to_text, doc_to_choice and
    doc_to_target; it writes a blank before every choice.
    """

    split: str
    published: int  # items of the whole public split: fewer of them are a subset
    fields: tuple[str, ...]  # that every record has
    ask: Callable[[Row], str | int]
    """The question; for `is_infill`, which choice is right."""
    target: Callable[[Row], int | str]
    """Which choice is right; without choices, the word, the whole text, or the right answer; for
    `is_infill`, what every choice is continued with."""
    choices: Callable[[Row], list[str]] | None = None  # None: the target is the only answer
    metrics: tuple[str, ...] = ("acc",)  # in `task_metrics.METRICS`
    is_infill: bool = False  # the choices are beginnings, and their common end is what is scored
    part: Callable[[Row], str] | None = None  # scores are given by part too
    folder: str | None = None  # of its files; None: the task's name
    records: Callable[[str], list[Row]] | None = None  # of a text file; None: a line is a record
    items: Callable[[Row], list[Row]] | None = None  # of one record; None: it is one
    group: str | None = None  # the field that tells which items are judged, and limited, together
    examples: str | None = None  # the split that solved examples are shown of; None: there are none
    shots: int = 0  # solved examples, where no number is given
    first: bool = False  # the first examples, and not some drawn for each item
    alike: Callable[[Row], str] | None = None  # examples are of the same kind as the item
    intro: Callable[[Row], str] | None = None  # before examples and question
    judge: Callable[[Row, Sequence[Any]], dict[str, Any]] | None = None
    """What the harness knows as process_results; None: its own."""
    guess: Callable[[Row], float] | None = None  # being right by chance; None: 1 / choices
    until: tuple[str, ...] = ()  # what ends an answer that is generated; (): none is
    max_tokens: int = 256  # of one
    filters: tuple[Mapping[str, Any], ...] = ()  # of one: the harness's filter_list
    options: Mapping[str, Mapping[str, Any]] | None = None  # more for a metric of the harness
    runs_code: bool = False  # what is generated is executed

    @property
    def output(self) -> Output:
        """What is asked of the model."""
        if self.choices is not None:
            return "multiple_choice"
        if self.records is not None:
            return "loglikelihood_rolling"
        return "generate_until" if self.until else "loglikelihood"
