"""A model with fresh weights, SaMoE or of a stock family, of a recipe's sizes."""

import difflib
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from smelt.checkpoint.initial import calm_routers, match_tokens
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.errors import RecipeError, SmeltError
from smelt.settings import expand_environment
from smelt.train.settings import TrainRecipe


def build_model(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The language model of a recipe, float32, with the weights it starts from.

    Of a family: fresh ones, the vocabulary and the special tokens the tokenizer's. Of a checkpoint:
    its own, stock or mapped, all of them to be trained.
    """
    if recipe.start is not None:
        return _started(recipe)
    config = build_config(recipe, tokenizer)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < recipe.sequence_length:
        raise RecipeError(
            f"model.max_position_embeddings is {positions}, text.sequence_length is "
            f"{recipe.sequence_length}. Raise the one or lower the other."
        )
    auto: Any = AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = AutoModelForSeq2SeqLM
    elif recipe.objective == "masked":
        auto = AutoModelForMaskedLM
    model: PreTrainedModel = _built(auto.from_config, config, recipe)
    model.float()
    if config.model_type == "switch_transformers":
        calm_routers(model)
        if recipe.attention == "matching":
            match_tokens(model)
    return model


def _started(recipe: TrainRecipe) -> PreTrainedModel:
    """The model of a checkpoint, with the recipe's fields changed in its configuration."""
    checkpoint = Checkpoint.open(expand_environment(recipe.start or ""))
    config = checkpoint.config
    known = {*config.to_dict(), *config.attribute_map}
    for name, value in recipe.model.fields().items():
        if name not in known:
            raise RecipeError(
                f"model.{name}: the configuration of {recipe.start} has no such field. "
                f"{_closest(name, sorted(known))}"
            )
        setattr(config, name, value)
    model = load_model(checkpoint)
    model.float()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def build_config(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The family's configuration with the recipe's fields; a field it does not have is an error."""
    settings = recipe.model
    assert settings.model_type is not None
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
    ours = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "router_aux_loss_coef": recipe.router_aux_loss,
        "router_z_loss_coef": recipe.router_z_loss,
    }
    ours = {name: value for name, value in ours.items() if name in known or "_token_id" in name}
    if stock.is_encoder_decoder:
        ours["decoder_start_token_id"] = tokenizer.pad_token_id
    if recipe.objective == "masked":
        ours["is_causal"] = False
    make: Any = kind
    if settings.preset is not None:
        make = lambda **fields: kind.from_preset(settings.preset, **fields)  # type: ignore[attr-defined]  # noqa: E731
    config: PreTrainedConfig = _built(make, None, recipe, **{**ours, **settings.fields()})
    if config.vocab_size < len(tokenizer):
        raise RecipeError(
            f"model.vocab_size is {config.vocab_size}, the tokenizer has {len(tokenizer)} tokens. "
            "Leave model.vocab_size out."
        )
    return config


def _built(make: Any, config: PreTrainedConfig | None, recipe: TrainRecipe, **fields: Any) -> Any:
    """What transformers makes; sizes that do not fit each other are the recipe's mistake."""
    try:
        return make(**fields) if config is None else make(config)
    except SmeltError as error:
        raise RecipeError(f"model: {error}") from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, AssertionError) as error:
        raise RecipeError(
            f"model: transformers cannot build this {recipe.model.model_type} ({error}). "
            "Check the sizes against each other."
        ) from None


def _closest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"Did you mean: {', '.join(found)}?" if found else f"There are: {', '.join(known)}."
