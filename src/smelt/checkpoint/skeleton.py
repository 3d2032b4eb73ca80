"""A model without weights: transformers' own class, parameters on the meta device, buffers real.

Shapes, names, ties and the forward are read off it; blocks get their weights for as long as they
are needed.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from smelt.checkpoint import mapped
from smelt.errors import CheckpointError

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within: a parameter moves to the meta device the moment it is registered."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def model_class(
    config: PreTrainedConfig, folder: str, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """The class that from_pretrained would build for this configuration."""
    if isinstance(config, mapped.SmeltMappedConfig):
        return mapped.model_class(config)
    architectures = config.architectures or []
    auto_map: dict[str, Any] = getattr(config, "auto_map", None) or {}
    if trust_remote_code:
        for auto in AUTO_CLASSES:
            if auto in auto_map:
                return get_class_from_dynamic_module(auto_map[auto], folder)
    for name in architectures:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in AUTO_CLASSES:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise CheckpointError(
        f"{folder}: config.json names the architecture {', '.join(architectures) or 'none'}, which "
        f"transformers {transformers.__version__} does not have. docs/add-a-family.md says how a "
        "family is added."
    )


def build(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The skeleton of `cls(config)`: evaluation mode, parameters on meta in their runtime types."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = cls._from_config(config, dtype=dtype)
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, param in model.named_parameters():
            if pattern in name:
                param.data = param.data.to(kept)
    model.eval()
    model.requires_grad_(False)
    return model


def outermost_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model by name: direct members of its outermost module lists."""
    blocks: dict[str, nn.Module] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, nn.ModuleList):
                blocks.update({f"{path}.{i}": block for i, block in child.named_children()})
            else:
                visit(path, child)

    visit("", model)
    return blocks
