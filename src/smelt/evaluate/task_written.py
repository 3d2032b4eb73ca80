"""Tasks with nothing to choose from: the last word, a whole text, an answer written out."""

import re
from collections.abc import Sequence
from typing import Any

from smelt.evaluate.task_kinds import Row, Task


def _all_but_last_word(row: Row) -> str:
    return str(row["text"]).rpartition(" ")[0]


def _last_word(row: Row) -> str:
    return " " + str(row["text"]).rpartition(" ")[2]


_TITLE = re.compile(r"= (?!= ).*(?<! =) =")
"""A line that begins a page of WikiText: its title between single signs of equality."""


def _pages(text: str) -> list[Row]:
    """The pages of WikiText, each with its title; lines before the first one are a page too."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _TITLE.fullmatch(line.strip()):
            pages.append([])
        pages[-1].append(line)
    joined = ("\n".join(lines) for lines in pages)
    return [{"page": page} for page in joined if page.strip()]


def _running_text(row: Row) -> str:
    """The page without the blanks around its signs, by the harness's own function."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return str(wikitext_detokenizer(row))


def _per_word(row: Row, answers: Sequence[Any]) -> dict[str, Any]:
    """Words and bytes are counted on the page as the file has it, as the harness does."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    found: dict[str, Any] = process_results(row, answers)
    return found


def _executed(row: Row, answers: Sequence[Any]) -> dict[str, Any]:
    """Whether the program passes its tests, in a process that can do little else."""
    from smelt.evaluate.sandbox import passes

    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    return {"pass@1": float(passes(row["prompt"] + str(answers[0]), tests))}


def _found_by(name: str, pattern: str, **more: Any) -> dict[str, Any]:
    """A filter of the harness: the answer is what a pattern finds in the text."""
    regex = {"function": "regex", "regex_pattern": pattern, **more}
    return {"name": name, "filter": [regex, {"function": "take_first"}]}


WRITTEN: dict[str, Task] = {
    "lambada": Task(
        split="test",
        published=5_153,
        fields=("text",),
        ask=_all_but_last_word,
        target=_last_word,
        metrics=("acc", "perplexity"),
    ),
    "wikitext": Task(
        folder="wikitext2_raw",
        split="test",
        published=62,
        fields=("page",),
        records=_pages,
        ask=lambda row: "",
        target=_running_text,
        judge=_per_word,
        metrics=("word_perplexity", "byte_perplexity", "bits_per_byte"),
    ),
    "gsm8k": Task(
        split="test",
        published=1_319,
        fields=("question", "answer"),
        ask=lambda row: f"Question: {row['question']}\nAnswer:",
        target=lambda row: str(row["answer"]),
        metrics=("exact_match,strict-match", "exact_match,flexible-extract"),
        examples="train",
        shots=5,
        until=("Question:", "</s>", "<|im_end|>"),
        filters=(
            _found_by("strict-match", r"#### (\-?[0-9\.\,]+)"),
            _found_by("flexible-extract", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
        ),
        options={
            "exact_match": {
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
            }
        },
    ),
    "humaneval": Task(
        split="test",
        published=164,
        fields=("prompt", "entry_point", "test"),
        ask=lambda row: str(row["prompt"]),
        target=lambda row: f"{row['test']}\ncheck({row['entry_point']})",
        judge=_executed,
        metrics=("pass@1",),
        until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        max_tokens=1024,
        runs_code=True,
    ),
}
"""By name, which is also that of the folder where none is named."""
