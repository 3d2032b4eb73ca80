"""The models of a healing run: held against each other, and what of the student is trained."""

import json
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from smelt.checkpoint.anatomy import Anatomy, dissect
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError, RecipeError
from smelt.train.heal_settings import HealRecipe, LoraSettings

PROVENANCE = "smelt/provenance.json"


def check_pair(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise unless the teacher's predictions can be compared with the student's.

    Raises:
        CheckpointError: another tokenizer or vocabulary, or one is an encoder–decoder.
    """
    who = f"{teacher.folder} cannot teach {student.folder}: "
    ask = "Name the checkpoint that the student was made from as --teacher."
    sizes = [one.config.get_text_config().vocab_size for one in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{who}it has a vocabulary of {sizes[1]:,} tokens, the student {sizes[0]:,}. {ask}"
        )
    words = [one.tokenizer.get_vocab() for one in (student, teacher)]
    if words[0] != words[1]:
        other = next(w for w in sorted(words[0] | words[1]) if words[0].get(w) != words[1].get(w))
        raise CheckpointError(
            f"{who}it has another tokenizer ({other!r} is token {words[1].get(other)} there and "
            f"{words[0].get(other)} here), so the same token means another text. {ask}"
        )
    if student.config.is_encoder_decoder != teacher.config.is_encoder_decoder:
        raise CheckpointError(f"{who}only one of the two is an encoder–decoder. {ask}")
    _warn_of_another_origin(student, teacher)


def _warn_of_another_origin(student: Checkpoint, teacher: Checkpoint) -> None:
    path = student.folder / PROVENANCE
    if not path.is_file():
        return
    try:
        origin = json.loads(path.read_text(encoding="utf-8")).get("source_fingerprint")
    except ValueError:
        origin = None
    if origin is not None and origin != teacher.fingerprint:
        warnings.warn(
            f"{student.folder} was made from checkpoint {origin[:12]}…, the teacher "
            f"{teacher.folder} is {teacher.fingerprint[:12]}…: going on, but this is not its "
            "original.",
            stacklevel=3,
        )


def router_parameters(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """The names of the parameters that score experts, as the checkpoint's anatomy knows them.

    Everything in a layer's router module, and whatever else outside the experts has an axis of
    experts (a selection bias).
    """
    modules = tuple(f"{layer.router}." for layer in anatomy.layers if layer.router)
    named = {name for axes in anatomy.axes.values() for name in axes}
    return {n for n, _ in model.named_parameters() if n in named or n.startswith(modules)}


def expert_parameters(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """The names of all parameters of experts, in whatever form these are now."""
    inside = tuple(f"{layer.experts}." for layer in anatomy.layers)
    return {name for name, _ in model.named_parameters() if name.startswith(inside)}


def choose_trained(model: PreTrainedModel, student: Checkpoint, recipe: HealRecipe) -> None:
    """Make the parameters trainable that the recipe trains, and no others.

    Raises:
        RecipeError: routers alone are to be trained, and they have no parameters.
    """
    anatomy = dissect(student)
    routers = router_parameters(model, anatomy)
    everything = {name for name, _ in model.named_parameters()}
    chosen = {
        "all": everything - routers,
        "experts": expert_parameters(model, anatomy),
        "routers": routers,
        "lora": {name for name in everything if ".lora_" in name},
    }[recipe.train]
    if recipe.train_routers:
        chosen |= routers
    if not chosen:
        raise RecipeError(
            f"train: {recipe.train}: {student.folder} has no such parameters. Train: all."
        )
    for name, parameter in model.named_parameters():
        is_number = parameter.is_floating_point()
        parameter.requires_grad_(is_number and name in chosen)


class Lora:
    """Low-rank updates beside the weights of a model, through PEFT.

    Args:
        model: gets them in place.
        student: whose anatomy says which parameters are experts and which routers.

    Raises:
        RecipeError: PEFT is not installed.
    """

    def __init__(self, model: PreTrainedModel, student: Checkpoint, settings: LoraSettings) -> None:
        try:
            from peft import LoraConfig, LoraModel
        except ImportError:
            raise RecipeError(
                "train: lora needs the package peft. Install it with: pip install 'smelt[lora]', "
                "or train: experts."
            ) from None
        if getattr(model.config, "factored_experts", None):
            raise RecipeError(
                f"train: lora: the experts of {student.folder} are of low rank already. Train: "
                "experts."
            )
        anatomy = dissect(student)
        routers = router_parameters(model, anatomy)
        experts = expert_parameters(model, anatomy)
        linear = _linear_modules(model, routers)
        stacked = sorted(
            name
            for name in experts
            if name.rpartition(".")[0] not in linear and model.get_parameter(name).ndim == 3
        )
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            target_modules=linear,
            target_parameters=stacked or None,
            bias="none",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT, to its developers
            self._lora: Any = LoraModel(model, config, "default")

    def merge(self) -> None:
        """Add the updates to the weights; the model is as it was before, with other values."""
        with torch.no_grad():
            self._lora.merge_and_unload()


def _linear_modules(model: PreTrainedModel, routers: Iterable[str]) -> list[str]:
    """Linear layers but for routers and embeddings' inverses, which are tied."""
    known = set(routers)
    output: Any = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and f"{name}.weight" not in known
    ]
