"""One question of a benchmark as text, and one answer to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
"""One line of a task's file."""


@dataclass(frozen=True)
class Item:
    """One question as text to text."""

    name: str  # its own in a split: what outcomes are paired by
    question: str  # what is asked, and about which sentences
    cue: str  # ends the question: the answer's place comes after it
    target: str  # the answer that is trained on
    context: str = ""  # read after the question, cut where it does not fit; "": there is none
    answer_at: int | None = None  # where the answer begins in the context: for training alone
    choices: tuple[str, ...] = ()  # answers to choose from; (): one is generated
    label: int | None = None  # which choice is right
    references: tuple[str, ...] = ()  # right answers, where one is generated
    group: str = ""  # items that are ranked or judged together
    source: str = ""  # what items of one text share: kept on one side of a split


@dataclass(frozen=True)
class Answer:
    """What was answered to an item: by a model, or by a rule that never read the question."""

    scores: tuple[float, ...] = ()  # of each choice: higher is more likely
    text: str = ""  # generated

    @property
    def choice(self) -> int:
        """The choice with the highest score; the first of equal ones."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)
