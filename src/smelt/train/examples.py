"""Examples of a recipe's objective out of token shards: for training and held out."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smelt.errors import RecipeError
from smelt.text.spans import sentinels, span_corruption
from smelt.train.batches import CausalRows, ExampleRows, MaskedRows, Masking, Rows
from smelt.train.data import Example, next_token_examples
from smelt.train.measure import label_counts
from smelt.train.settings import TrainRecipe
from smelt.train.shards import Shard


def training_set(
    tokens: Shard,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TrainRecipe,
) -> tuple[Rows, Tensor]:
    """The examples, and how often each token is a label in them."""
    rows: Rows
    if model.config.is_encoder_decoder:
        examples = _spans(tokens, model, tokenizer, recipe)
        rows, counts = ExampleRows(examples), label_counts(examples, model.config.vocab_size)
    else:
        counts = tokens.counts(model.config.vocab_size)
        if recipe.objective == "masked":
            rows = MaskedRows(tokens, Masking(tokenizer, recipe.masked), recipe.seed)
        else:
            rows = CausalRows(tokens)
    if len(rows) < recipe.batch_size:
        need = recipe.batch_size * recipe.text.sequence_length
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
    if model.config.is_encoder_decoder:
        return _spans(tokens, model, tokenizer, recipe)
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
) -> list[Example]:
    marks: Sequence[int] = sentinels(tokenizer)
    if len(marks) < 2:
        raise RecipeError(
            f"{recipe.model.model_type} is trained by span corruption, and the tokenizer has "
            f"{len(marks)} tokens <extra_id_N>. Set tokenizer.sentinels, e.g. to 32."
        )
    return span_corruption(
        tokens.blocks(),
        sentinel_ids=marks,
        density=recipe.spans.density,
        mean_span=recipe.spans.mean_span,
        seed=recipe.text.seed,
        pad_id=int(model.config.pad_token_id),
        start_id=int(model.config.decoder_start_token_id),
    ).examples()
