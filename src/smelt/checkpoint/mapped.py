"""Loads checkpoints in smelt's mapped form: fewer stored experts behind an unchanged router.

This file, `factored.py` and `factored_forward.py` are self-contained (torch and transformers only).
Copies lie beside the weights of every mapped checkpoint, so that `from_pretrained(folder,
trust_remote_code=True)` works without smelt; with smelt installed, `import smelt` is enough.

A mapped layer stores G experts and `expert_map[E]`. A token that chose expert e is served by stored
expert `expert_map[e]`; two choices of one token that fall together run once, with their weights
summed. `expert_map[e] = G` is an empty slot, and `G + 1 + j` gives row j of `constants`, a vector.
Its experts' matrices may be factored too: see `factored.py`. Licensed under Apache-2.0, as smelt
is.
"""

import os
import shutil
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from .factored import define, factor_experts
from .factored_forward import fold

FILE_NAME = "modeling_smelt_mapped.py"
NEIGHBOURS = ("factored.py", "factored_forward.py")
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")


class SmeltMappedConfig(PreTrainedConfig):
    """The base family's configuration with three fields more, or up to five.

    base_model_type: the family's own model type.
    base_architecture: the family's own model class.
    mapped_experts: stored experts G of each mapped experts module, by its name.
    constant_experts: of those with constants, their number.
    factored_experts: of those in factored form, by matrix: {"rank": R, "rows": kept rows of S}.
    """

    model_type = "smelt_mapped"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "base_model_type" in config_dict and cls is SmeltMappedConfig:
            found = config_class(config_dict["base_model_type"])
            # The Auto classes refuse a model class that names another configuration class.
            SmeltMappedModel.config_class = found
            if "base_architecture" in config_dict:
                _define_model(found, config_dict["base_architecture"])
            return found.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


def config_class(base_model_type: str) -> type[SmeltMappedConfig]:
    """The base family's configuration class, with model type "smelt_mapped"."""
    base = CONFIG_MAPPING[base_model_type]
    name = f"SmeltMapped{base.__name__}"
    found: type[SmeltMappedConfig] = _define(name, (SmeltMappedConfig, base), {"_auto_class": None})
    return found


def model_class(config: Any) -> type[PreTrainedModel]:
    """The base family's model class, with its experts mapped as the configuration says."""
    return _define_model(type(config), config.base_architecture)


def _define_model(config_type: type[SmeltMappedConfig], architecture: str) -> type[PreTrainedModel]:
    """The same, registered with the Auto classes under the configuration's class."""
    base = getattr(transformers, architecture)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(cls, self).__init__(config, *args, **kwargs)
        for name, num_stored in config.mapped_experts.items():
            constants = (getattr(config, "constant_experts", None) or {}).get(name, 0)
            map_experts(self.get_submodule(name), num_stored, constants)
        for name, spec in (getattr(config, "factored_experts", None) or {}).items():
            factor_experts(self.get_submodule(name), spec)

    def save_pretrained(self: Any, save_directory: Any, **kwargs: Any) -> None:
        super(cls, self).save_pretrained(save_directory, **kwargs)
        copy_code(save_directory)

    members = {
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "config_class": config_type,
        "_auto_class": None,
    }
    cls: Any = _define(f"SmeltMapped{base.__name__}", (base,), members)
    for auto in auto_classes(config_type):
        getattr(transformers, auto).register(config_type, cls, exist_ok=True)
    return cls


def copy_code(folder: Any) -> None:
    """Copy the modelling files beside the weights."""
    shutil.copyfile(__file__, os.path.join(folder, FILE_NAME))
    for name in NEIGHBOURS:
        shutil.copyfile(os.path.join(os.path.dirname(__file__), name), os.path.join(folder, name))


def auto_classes(config_type: type[SmeltMappedConfig]) -> list[str]:
    """The Auto classes that know the base family."""
    base = config_type.__mro__[2] if config_type is not SmeltMappedConfig else config_type
    return [a for a in AUTO_CLASSES if base in getattr(transformers, a)._model_mapping]


class SmeltMappedModel(PreTrainedModel):
    """What `auto_map` names: builds the right class for the configuration."""

    config_class = SmeltMappedConfig

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        config = (
            AutoConfig.from_pretrained(path, trust_remote_code=True) if config is None else config
        )
        return model_class(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return model_class(config)._from_config(config, **kwargs)


def map_experts(experts: nn.Module, num_stored: int, num_constants: int = 0) -> None:
    """Turn an experts module of E slots into one that stores `num_stored` and maps ids to them.

    With `num_constants`, it also holds so many vectors, as wide as its output, to map ids to.
    """
    like = _down(experts)
    target: Any = experts
    num_experts: int = target.num_experts
    if isinstance(experts, nn.ModuleDict):
        device = next(experts.parameters()).device
        for index in range(num_stored, num_experts):
            del experts[f"expert_{index}"]
        forward = _forward_one_hot
    else:
        device = next(iter(experts._parameters.values())).device  # type: ignore[union-attr]
        for name, param in list(experts._parameters.items()):
            if param is not None and param.shape[0] == num_experts:
                kept = param.data[:num_stored].clone()
                setattr(experts, name, nn.Parameter(kept, requires_grad=param.requires_grad))
        target._is_expert_parallel = True  # lets a slot be empty: id = num_experts, weight 0
        forward = _forward_ids
    target.num_experts = num_stored
    zeros = torch.zeros(num_experts, dtype=torch.int32, device=device)
    experts.register_buffer("expert_map", zeros)
    if num_constants:
        width = like.shape[0]
        rows = torch.zeros(num_constants, width, dtype=like.dtype, device=device)
        experts.register_parameter("constants", nn.Parameter(rows, like.requires_grad))
    base = type(experts)
    members = {"forward": forward, "_unmapped": base}
    experts.__class__ = _define(f"SmeltMapped{base.__name__}", (base,), members)


def _down(experts: Any) -> Tensor:
    """The down projection of one expert, out × in."""
    if isinstance(experts, nn.ModuleDict):
        first: Any = experts["expert_0"]
        return first.wo.weight
    return experts.down_proj[0].T if experts.is_transposed else experts.down_proj[0]


def _with_constants(self: Any, y: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """y [.., D] and what the choices ids [.., K] that map to constants give by their weights."""
    if "constants" not in self._parameters:
        return y
    which = self.expert_map.long()[ids] - self.num_experts - 1
    weight = weight.masked_fill(which < 0, 0).to(self.constants.dtype)
    added = (weight.unsqueeze(-1) * self.constants[which.clamp(min=0)]).sum(-2)
    return y + added.reshape(y.shape).to(y.dtype)


def _forward_ids(self: Any, hidden_states: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
    base = self._unmapped  # not the next class: PEFT puts one of its own before ours
    stored, summed = fold(self.expert_map, choice, weight, self.num_experts)
    if self.has_bias and self.config._experts_implementation == "eager":
        # The eager forward of biased experts knows no empty slot: any expert, with weight 0.
        stored = stored.masked_fill(stored == self.num_experts, 0)
    return _with_constants(self, base.forward(self, hidden_states, stored, summed), choice, weight)


def _forward_one_hot(self: Any, hidden_states: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
    base = self._unmapped  # not the next class: PEFT puts one of its own before ours
    # The last column is the empty slot of dropped experts: their tokens reach no expert.
    places = self.expert_map.long().clamp(max=self.num_experts)
    table = nn.functional.one_hot(places, self.num_experts + 1)[:, :-1]
    y = base.forward(self, hidden_states, choice @ table.to(choice.dtype), weight)
    found, ids = choice.max(-1)  # a token dropped for capacity chose nobody
    kept = weight.reshape(ids.shape).masked_fill(found == 0, 0)
    return _with_constants(self, y, ids, kept)


def _define(name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
    return define(__name__, name, bases, members)


def register() -> None:
    """Make AutoConfig know the mapped form; model classes follow when a configuration is read."""
    AutoConfig.register(SmeltMappedConfig.model_type, SmeltMappedConfig, exist_ok=True)
