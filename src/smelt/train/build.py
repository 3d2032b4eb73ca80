"""A stock model with fresh weights, of a recipe's family and sizes."""

import difflib

from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from smelt.errors import RecipeError
from smelt.train.settings import ModelSettings


def build_model(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    router_aux_loss: float,
) -> PreTrainedModel:
    """The family's own language model, float32, initialised by transformers.

    The vocabulary and the special tokens are the tokenizer's.
    """
    config = build_config(settings, tokenizer, router_aux_loss)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        raise RecipeError(
            f"model.max_position_embeddings is {positions}, text.sequence_length is "
            f"{sequence_length}. Raise the one or lower the other."
        )
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        model: PreTrainedModel = auto.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, AssertionError) as error:
        raise RecipeError(
            f"model: transformers cannot build this {settings.model_type} ({error}). "
            "Check the sizes against each other."
        ) from None
    model.float()
    return model


def build_config(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, router_aux_loss: float
) -> PreTrainedConfig:
    """The family's configuration with the recipe's fields; a field it does not have is an error."""
    if settings.model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"model.model_type = {settings.model_type!r} is no family transformers knows. "
            f"{_closest(settings.model_type, list(CONFIG_MAPPING))}"
        )
    kind = CONFIG_MAPPING[settings.model_type]
    stock = kind()
    # Read by modelling code of many families whose configuration class does not declare it.
    known = {*stock.to_dict(), *stock.attribute_map, "head_dim"}
    for name in settings.fields():
        if name not in known:
            raise RecipeError(
                f"model.{name}: {settings.model_type} has no such setting. "
                f"{_closest(name, sorted(known))}"
            )
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if "router_aux_loss_coef" in known:
        special["router_aux_loss_coef"] = router_aux_loss
    if stock.is_encoder_decoder:
        special["decoder_start_token_id"] = tokenizer.pad_token_id
    config: PreTrainedConfig = kind(**{**special, **settings.fields()})
    if config.vocab_size < len(tokenizer):
        raise RecipeError(
            f"model.vocab_size is {config.vocab_size}, the tokenizer has {len(tokenizer)} tokens. "
            "Leave model.vocab_size out."
        )
    return config


def _closest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"Did you mean: {', '.join(found)}?" if found else f"There are: {', '.join(known)}."
