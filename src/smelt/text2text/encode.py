"""Items as tokens: what is read, what is answered, and what had to be cut."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from smelt.errors import RecipeError
from smelt.text.spans import sentinels
from smelt.text2text.items import Item
from smelt.text2text.words import asked_words


@dataclass(frozen=True)
class Encoded:
    """One item in tokens."""

    item: Item
    input_ids: tuple[int, ...]
    target_ids: tuple[int, ...]  # of the target; the sentinel first, the end last
    is_cut: bool  # the question or the context did not fit
    is_target_cut: bool


class Encoder:
    """Items to tokens and back, alike for training, choosing and reporting.

    An input is `QUESTION CUE <extra_id_0> context: CONTEXT`, a target `<extra_id_0> ANSWER`, both
    with an end-of-sequence token: what span corruption taught the model is asked of it again. A
    tokenizer without such tokens does without.

    What does not fit is cut: the question's end, so that half of the length is left to the context;
    then the context, of which the part nearest the question stays: the one with the most of its
    words. For training, it is the nearest of the parts that hold the answer; otherwise the answer
    is not looked at.

    Args:
        tokenizer: a fast one, with an end-of-sequence token.
        max_input: tokens.
        max_target: tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_input: int, max_target: int
    ) -> None:
        if tokenizer.eos_token_id is None or not tokenizer.is_fast:
            raise RecipeError(
                f"The {type(tokenizer).__name__} cannot mark the end of an answer, or is not fast. "
                "Save it with a tokenizer.json and an eos_token."
            )
        self.tokenizer, self.max_input, self.max_target = tokenizer, max_input, max_target
        self.end = int(tokenizer.eos_token_id)
        self.mark = tuple(sentinels(tokenizer)[:1])

    def encode(self, items: Sequence[Item], *, for_training: bool) -> list[Encoded]:
        """The items in tokens, in their order."""
        questions = self._ids([item.question for item in items])
        cues = {cue: self._ids([" " + cue])[0] for cue in {item.cue for item in items}}
        targets = self._ids([" " + item.target for item in items])
        contexts = self._contexts([item.context for item in items])
        before = self._ids([" context:"])[0]
        found = []
        for item, question, target in zip(items, questions, targets, strict=True):
            cue = [*cues[item.cue], *self.mark]
            room = self.max_input - 1 - len(cue)
            context, ends = contexts[item.context]
            most = room if not context else max(room // 2, room - len(context) - len(before))
            kept = question[:most]
            left = room - len(kept) - len(before)
            begin = 0
            if len(context) > left > 0:
                begin = _window(item, ends, left, with_answer=for_training)
            part = context[begin : begin + max(left, 0)]
            answer = [*self.mark, *target]
            found.append(
                Encoded(
                    item,
                    (*kept, *cue, *(before if part else ()), *part, self.end),
                    (*answer[: self.max_target - 1], self.end),
                    is_cut=len(kept) < len(question) or len(part) < len(context),
                    is_target_cut=len(answer) > self.max_target - 1,
                )
            )
        return found

    def choices(self, item: Item) -> list[tuple[int, ...]]:
        """The tokens of each choice, as of a target, but cut nowhere."""
        return [
            (*self.mark, *ids, self.end)
            for ids in self._ids([" " + choice for choice in item.choices])
        ]

    def text(self, ids: Sequence[int]) -> str:
        """A generated answer; what follows its end, and sentinels, are left out."""
        ids = list(ids)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _contexts(self, texts: list[str]) -> dict[str, tuple[list[int], list[int]]]:
        """Each context once: its tokens, and where in the text each of them ends."""
        unique = list(dict.fromkeys(texts))
        encoded = self.tokenizer(
            [" " + text for text in unique],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return {
            text: (list(ids) if text else [], [end - 1 for _, end in offsets])
            for text, ids, offsets in zip(
                unique, encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        }


def _window(item: Item, ends: Sequence[int], size: int, *, with_answer: bool) -> int:
    """Where the part of the context begins that stays: `size` of its tokens.

    Args:
        item: its question and its context.
        ends: where in the context each token ends.
        size: tokens, fewer than there are.
        with_answer: whether the part must hold the answer, as far as it can.
    """
    places = range(len(ends) - size + 1)
    shared = _shared_words(item, ends, size)
    nearest = _middle_of_best(shared, places)
    if not with_answer or item.answer_at is None:
        return nearest
    first = bisect_left(ends, item.answer_at + 1)
    last = min(bisect_left(ends, item.answer_at + len(item.target)), len(ends) - 1)
    holding = range(max(0, last - size + 1), min(first, places[-1]) + 1)
    if not holding:  # a longer answer than there is room: its beginning
        return min(first, places[-1])
    return nearest if nearest in holding else _middle_of_best(shared, holding)


def _shared_words(item: Item, ends: Sequence[int], size: int) -> list[int]:
    """How many of the question's words each part of so many tokens holds, by where it begins."""
    asked = asked_words(item.question)
    at: dict[int, list[str]] = {}  # by the token that ends the word
    for match in re.finditer(r"\w+", item.context):
        if (word := match.group().lower()) in asked:
            at.setdefault(bisect_left(ends, match.end()), []).append(word)
    held: Counter[str] = Counter()
    found = []
    for end in range(len(ends)):
        held.update(at.get(end, ()))
        if end >= size:
            held.subtract(at.get(end - size, ()))
        if end >= size - 1:
            found.append(sum(number > 0 for number in held.values()))
    return found


def _middle_of_best(scores: Sequence[int], places: range) -> int:
    """The place with the highest score; of equal neighbours, the one in their middle."""
    best = max(places, key=scores.__getitem__)  # the first of equal ones
    end = best
    while end + 1 in places and scores[end + 1] == scores[best]:
        end += 1
    return (best + end) // 2
