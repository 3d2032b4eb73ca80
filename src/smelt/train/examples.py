"""Examples of a recipe's objective, out of token shards or a task: for training and held out."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smelt import processes
from smelt.errors import RecipeError
from smelt.text.recurring import common_tokens, word_starts
from smelt.text.sources import TextSource
from smelt.text.spans import Corruption, Mixture, sentinels
from smelt.train.batches import CausalRows, MaskedRows, Masking, Rows, SpanRows
from smelt.train.data import Example, next_token_examples
from smelt.train.measure import HeldOut, label_counts
from smelt.train.settings import TrainRecipe
from smelt.train.shards import Shard, shard
from smelt.train.task_examples import TrainingSet, task_data

COUNTED = 2048  # corrupted sequences whose labels are counted: others are drawn in each epoch


def training_data(
    recipe: TrainRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> TrainingSet:
    """What a recipe trains on and holds out, of its text or of its task.

    Raises:
        RecipeError: too little text for one batch, a task for a model that is not for it.
        SmeltError: text or task files that cannot be read.
    """
    if recipe.task is not None:
        task = recipe.task
        found = processes.in_turn(lambda: task_data(task, model, tokenizer))
        if len(found.rows) < recipe.batch_size:
            raise RecipeError(
                f"task {task.name} has {len(found.rows)} training examples, fewer than the "
                f"{recipe.batch_size} of one batch. Raise task.limit or lower batch_size."
            )
        return found
    text = recipe.text
    assert text is not None

    def drawn(sources: Sequence[TextSource], num_tokens: int) -> Shard:
        return processes.in_turn(lambda: shard(sources, tokenizer, text, num_tokens))

    tokens = drawn(text.train, text.tokens)
    rows, counts = training_set(tokens, model, tokenizer, recipe)
    held_out = []
    for source in text.held_out:
        cut = drawn([source], text.held_out_tokens)
        examples = held_out_examples(cut, model, tokenizer, recipe)
        held_out.append(HeldOut(str(source), examples, cut.blocks()))
    return TrainingSet(rows, counts, held_out, tokens.sha256, tokens.num_tokens)


def training_set(
    tokens: Shard,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TrainRecipe,
) -> tuple[Rows, Tensor]:
    """The examples, and how often each token is a label in them."""
    assert recipe.text is not None
    rows: Rows
    if model.config.is_encoder_decoder:
        corruption = _spans(tokens, model, tokenizer, recipe)
        spans = SpanRows(tokens, corruption, recipe.text.seed, redraw=recipe.spans.redraw)
        some = spans.__getitems__(range(min(len(spans), COUNTED)))["labels"]
        rows, counts = spans, label_counts([{"labels": some}], model.config.vocab_size)
    else:
        counts = tokens.counts(model.config.vocab_size)
        if recipe.objective == "masked":
            rows = MaskedRows(tokens, Masking(tokenizer, recipe.masked), recipe.seed)
        else:
            rows = CausalRows(tokens)
    if len(rows) < recipe.batch_size:
        need = recipe.batch_size * recipe.sequence_length
        raise RecipeError(
            f"The training text has {len(rows)} sequences of {recipe.text.sequence_length} tokens, "
            f"fewer than the {recipe.batch_size} of one batch. Give at least {need:,} tokens "
            "(text.tokens, and text that holds as many), or lower batch_size."
        )
    return rows, counts


def held_out_examples(
    tokens: Shard,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TrainRecipe,
) -> list[Example]:
    """The examples of a held-out text; which tokens are masked is the same in every run."""
    assert recipe.text is not None
    if model.config.is_encoder_decoder:
        corruption = _spans(tokens, model, tokenizer, recipe)
        return corruption.of_blocks(tokens.blocks(), recipe.text.seed).examples()
    blocks = tokens.blocks()
    if recipe.objective == "causal":
        return next_token_examples(blocks)
    seeds = [(recipe.text.seed, row) for row in range(len(blocks.input_ids))]
    hidden = Masking(tokenizer, recipe.masked).hide(blocks.input_ids, blocks.mask, seeds)
    return [
        {name: value[row] for name, value in hidden.items()} for row in range(len(blocks.input_ids))
    ]


def _spans(
    tokens: Shard,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TrainRecipe,
) -> Corruption:
    """How the recipe corrupts text; what is common is counted in the text at hand."""
    marks: Sequence[int] = sentinels(tokenizer)
    if len(marks) < 2:
        raise RecipeError(
            f"{model.config.model_type} is trained by span corruption, and the tokenizer has "
            f"{len(marks)} tokens <extra_id_N>. Set tokenizer.sentinels, e.g. to 32."
        )
    own = recipe.spans
    mixture = None
    if own.recurring or own.cloze:
        mixture = Mixture(
            recurring=own.recurring,
            cloze=own.cloze,
            starts_word=word_starts(tokenizer),
            common=common_tokens(tokens.counts(model.config.vocab_size)),
        )
    return Corruption(
        tuple(marks),
        density=own.density,
        mean_span=own.mean_span,
        pad_id=int(model.config.pad_token_id),
        start_id=int(model.config.decoder_start_token_id),
        mixture=mixture,
    )
