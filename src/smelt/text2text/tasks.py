"""The eight benchmarks of the M-SMoE paper: files, splits, lengths and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from smelt.text2text import readers

Kind = Literal["classify", "judge", "rank", "answer"]


@dataclass(frozen=True)
class Task:
    """How the files of a benchmark become items, and which of them may be used for what."""

    title: str
    read: readers.Reader
    fields: tuple[str, ...]  # that every record has
    kind: Kind
    """What is measured: choices one by one (classify), all candidates of a question together
    (judge), candidates ranked within their question (rank), generated answers (answer)."""
    report: str  # the split that is reported: the labelled test, else the validation split
    published: Mapping[str, int]  # records of the whole public splits: fewer are a subset
    max_input: int = 128  # tokens
    max_target: int = 8
    has_f1: bool = False  # of the positive class
    has_yes_no: bool = False  # HotpotQA's F1: yes and no share no words with other answers

    @property
    def choose(self) -> str | None:
        """The split to choose anything on; None: a tenth of the training split."""
        return "validation" if self.report == "test" else None


TASKS: dict[str, Task] = {
    "sst2": Task(
        title="SST-2",
        read=readers.sst2,
        fields=("sentence", "label"),
        kind="classify",
        report="test",
        published={"train": 67_349, "validation": 872, "test": 1_821},
    ),
    "mrpc": Task(
        title="MRPC",
        read=readers.mrpc,
        fields=("sentence1", "sentence2", "label"),
        kind="classify",
        report="test",
        published={"train": 3_668, "validation": 408, "test": 1_725},
        has_f1=True,
    ),
    "multirc": Task(
        title="MultiRC",
        read=readers.multirc,
        fields=("passage",),
        kind="judge",
        report="validation",
        published={"train": 456, "validation": 83},
        max_input=512,
    ),
    "copa": Task(
        title="COPA",
        read=readers.copa,
        fields=("premise", "choice1", "choice2", "question", "label"),
        kind="classify",
        report="test",
        published={"train": 400, "validation": 100, "test": 500},
    ),
    "winogrande": Task(
        title="WinoGrande",
        read=readers.winogrande,
        fields=("qID", "sentence", "option1", "option2", "answer"),
        kind="classify",
        report="validation",
        published={"train": 10_234, "validation": 1_267},
        max_target=16,
    ),
    "squad": Task(
        title="SQuAD v1.1",
        read=readers.squad,
        fields=("context", "question", "answers"),
        kind="answer",
        report="validation",
        published={"train": 87_599, "validation": 10_570},
        max_input=384,
        max_target=32,
    ),
    "wikiqa": Task(
        title="WikiQA",
        read=readers.wikiqa,
        fields=("question_id", "question", "answer", "label"),
        kind="rank",
        report="test",
        published={"train": 20_360, "validation": 2_733, "test": 6_165},
    ),
    "hotpotqa": Task(
        title="HotpotQA (distractor)",
        read=readers.hotpotqa,
        fields=("question", "answer", "context"),
        kind="answer",
        report="validation",
        published={"train": 90_447, "validation": 7_405},
        max_input=512,
        max_target=32,
        has_yes_no=True,
    ),
}
