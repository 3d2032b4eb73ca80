"""Items as tokens: what is read, what is answered, and what had to be cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from smelt.errors import RecipeError
from smelt.text.spans import sentinels
from smelt.text2text.items import Item


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
    then the context. For training, the part of the context that holds the answer stays (around its
    middle, as far as there is text); otherwise the beginning stays, whatever the answer is.

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
            if for_training and item.answer_at is not None and len(context) > left > 0:
                begin = _window(ends, item.answer_at, item.answer_at + len(item.target), left)
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


def _window(ends: Sequence[int], answer_begin: int, answer_end: int, size: int) -> int:
    """Where a window of `size` tokens begins: at 0 if the answer is there, else with it in mid."""
    first = next(i for i, end in enumerate(ends) if end > answer_begin)
    last = next((i for i, end in enumerate(ends) if end >= answer_end), len(ends) - 1)
    if last < size:
        return 0
    return max(0, min((first + last) // 2 - size // 2, len(ends) - size, first))
