"""What a model writes by itself: repetition, loops, and how far it strays from its original.

Choices are scored by likelihoods, which hardly show what a compressed model does when it goes on
from its own words. Here it goes on from beginnings of a text.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.compress.calibrate import Progress
from smelt.compress.inputs import read_text
from smelt.compress.pipeline import Stages, silent
from smelt.errors import CalibrationError, CheckpointError
from smelt.evaluate.fidelity import compare_logits
from smelt.evaluate.repetition import Written, figures
from smelt.evaluate.results import Result, Setting, record
from smelt.evaluate.sequences import PerSequence
from smelt.evaluate.task_model import check_model, evaluating
from smelt.recipe import CalibrationRecipe
from smelt.settings import Settings


class Generating(Settings):
    """How a model is made to write."""

    tokens: Annotated[int, Field(ge=8)] = 64  # of a continuation, at most
    prompts: Annotated[int, Field(ge=2)] = 64
    prompt_tokens: Annotated[int, Field(ge=1)] = 32
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0: greedy
    batch_size: Annotated[int, Field(ge=1)] = 16

    def __str__(self) -> str:
        """As a person names it."""
        how = f"sampled at temperature {self.temperature:g}" if self.temperature else "greedy"
        return (
            f"{self.prompts} beginnings of {self.prompt_tokens} tokens, {self.tokens} tokens "
            f"more, {how}"
        )


@dataclass(frozen=True)
class Generation:
    """What one checkpoint wrote, measured; and the same of the text's own continuations."""

    name: str
    figures: tuple[Written, ...]
    of_text: dict[str, float]  # what the text itself has of each metric, over the same prompts
    texts: tuple[str, ...]  # what was written
    setting: Setting

    def records(self, checkpoint: Checkpoint) -> list[Result]:
        """The figures as named records."""
        return [
            dataclasses.replace(
                record(
                    checkpoint,
                    self.setting,
                    task="generation",
                    metric=one.metric,
                    value=one.value,
                    n=one.n,
                    standard_error=one.standard_error,
                ),
                unit=one.unit,
            )
            for one in self.figures
        ]


def measure_generation(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    recipe: CalibrationRecipe,
    how: Generating,
    *,
    original: Checkpoint | None = None,
    device: str = "cpu",
    stages: Stages = silent,
) -> list[Generation]:
    """What checkpoints write after the same beginnings of a text.

    Args:
        recipe: the text; its number of tokens and length of sequences are those of `how`.
        original: hold each against this one along what it wrote itself: both whole models are in
            memory.

    Raises:
        CalibrationError: the text is too short.
        CheckpointError: a model is not causal or has too few positions; the original has another
            vocabulary.
    """
    if original is not None:
        for one in checkpoints:
            _check_pair(original, one)
    prepared = [(_prompts(one, recipe, how), one) for one in checkpoints]
    theirs = load_model(original, device) if original is not None else None
    found: list[Generation] = []
    for (prompts, sha256), checkpoint in prepared:
        name = names[len(found)]
        same = original is not None and original.fingerprint == checkpoint.fingerprint
        setting = Setting((*recipe.text, str(how)), sha256, recipe.seed, device)
        found.append(
            _measured(
                name,
                load_model(checkpoint, device),
                checkpoint.tokenizer,
                prompts,
                how,
                setting,
                None if same else theirs,
                stages(f"{name} writes"),
            )
        )
    return found


def _prompts(
    checkpoint: Checkpoint, recipe: CalibrationRecipe, how: Generating
) -> tuple[Tensor, str]:
    """Sequences of the text, each a beginning and what the text itself goes on with."""
    check_model(checkpoint.model, checkpoint.tokenizer)
    length = how.prompt_tokens + how.tokens
    positions = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise CheckpointError(
            f"{checkpoint.folder}: has {positions} positions, and {how.prompt_tokens} tokens and "
            f"{how.tokens} more do not fit. Ask for fewer."
        )
    own = recipe.model_copy(update={"num_tokens": how.prompts * length, "sequence_length": length})
    blocks = read_text(checkpoint, own)
    whole = blocks.input_ids[blocks.mask.all(1)]
    if len(whole) < how.prompts - 1:  # the last one may lack a token or three
        raise CalibrationError(
            f"{', '.join(recipe.text)}: gives {len(whole)} of {how.prompts} beginnings of {length} "
            "tokens. Name a longer text, or ask for fewer prompts."
        )
    return whole, blocks.sha256


def _check_pair(original: Checkpoint, checkpoint: Checkpoint) -> None:
    ours, theirs = (c.config.get_text_config().vocab_size for c in (checkpoint, original))
    if ours != theirs:
        raise CheckpointError(
            f"{checkpoint.folder} cannot be held against {original.folder}: it has {ours:,} "
            f"tokens, the original {theirs:,}. Give the checkpoint that it was made from."
        )


def _measured(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Tensor,
    how: Generating,
    setting: Setting,
    original: PreTrainedModel | None,
    progress: Progress,
) -> Generation:
    device = model.device
    texts: list[list[int]] = []
    ended: list[bool] = []
    near: list[list[PerSequence]] = []
    with (
        evaluating(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(setting.seed)
        for batch in prompts.split(how.batch_size):
            begin = batch[:, : how.prompt_tokens].to(device)
            ids, lengths, ends = _write(model, tokenizer, begin, how)
            texts += [
                row[: length - int(end)].tolist()
                for row, length, end in zip(ids[:, how.prompt_tokens :], lengths, ends, strict=True)
            ]
            ended += ends
            if original is not None:
                near.append(_held_against(model, original, ids, lengths, how.prompt_tokens))
            progress(name, len(texts), len(prompts))
    found = figures(texts, ended)
    if near:
        kl, agreement = (PerSequence.join([one[i] for one in near]) for i in range(2))
        for metric, of in (
            ("KL to the original", kl),
            ("top-1 agreement with the original", agreement),
        ):
            found.append(Written(metric, of.mean, of.standard_error, of.num_tokens, "tokens"))
    text = figures([row[how.prompt_tokens :].tolist() for row in prompts])
    return Generation(
        name,
        tuple(found),
        {one.metric: one.value for one in text},
        tuple(tokenizer.decode(one) for one in texts),
        setting,
    )


def _write(
    model: PreTrainedModel, tokenizer: Any, begin: Tensor, how: Generating
) -> tuple[Tensor, list[int], list[bool]]:
    """Beginnings with continuations [B, T]; how long each is, and whether it ended by itself."""
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    ids = generate(
        input_ids=begin,
        attention_mask=torch.ones_like(begin),
        max_new_tokens=how.tokens,
        do_sample=how.temperature > 0,
        **({"temperature": how.temperature, "top_k": 0, "top_p": 1.0} if how.temperature else {}),
        num_beams=1,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=0 if pad is None else pad,
    )
    lengths, ends = [], []
    for row in ids[:, begin.shape[1] :].tolist():
        is_ended = end is not None and end in row
        lengths.append(row.index(end) + 1 if is_ended else len(row))
        ends.append(is_ended)
    return ids, lengths, ends


@torch.no_grad()
def _held_against(
    model: PreTrainedModel,
    original: PreTrainedModel,
    ids: Tensor,
    lengths: Sequence[int],
    begin: int,
) -> list[PerSequence]:
    """KL(model ‖ original) and top-1 agreement at every token that the model wrote."""
    places = torch.arange(ids.shape[1])
    until = begin - 1 + torch.tensor(lengths)[:, None]
    where = (places >= begin - 1) & (places < until)
    original.eval()
    ours = model(input_ids=ids, use_cache=False).logits
    theirs = original(input_ids=ids, use_cache=False).logits
    return compare_logits(ours, theirs, where)
