"""Which configuration field sets the hidden units of a family's experts, and nothing else."""

import copy
from collections.abc import Collection

from transformers import PreTrainedConfig

from smelt.checkpoint import skeleton
from smelt.checkpoint.bind import MoeLayer
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError


def hidden_field(
    checkpoint: Checkpoint, layers: Collection[MoeLayer], before: int, after: int
) -> str:
    """The field of config.json that makes every expert `after` units wide, and changes no more.

    Told by trying: a skeleton is built for each field that says `before`, and its shapes are
    compared. No list of families has to be kept.

    Raises:
        CheckpointError: there is none. In deepseek, glm4 and ernie the field sizes shared experts
            too, in jamba dense layers, in Switch the dense blocks.
    """
    also: set[str] = set()
    for name in _candidates(checkpoint, before):
        others = _others_changed(checkpoint, layers, name, after)
        if not others:
            return name
        also |= others
    shown = ", ".join(sorted(also)[:2])
    why = f"the field that sizes them also sizes {shown}" if also else "no field says it alone"
    raise CheckpointError(
        f"{checkpoint.folder}: the experts of {checkpoint.config.model_type} have {before} hidden "
        f"units, and {why}. Dropping some would not leave a checkpoint that its family can load: "
        "leave hidden_units out."
    )


def with_field(config: PreTrainedConfig, name: str, value: int) -> PreTrainedConfig:
    """A copy of the configuration with that field, of the text model where there is one, set."""
    changed = copy.deepcopy(config)
    setattr(changed.get_text_config(), name, value)
    return changed


def _candidates(checkpoint: Checkpoint, before: int) -> list[str]:
    """Fields that hold this number; those named after experts first."""
    fields = checkpoint.config.get_text_config().to_dict()
    found = [name for name, value in fields.items() if value == before and type(value) is int]
    return sorted(found, key=lambda name: ("moe" not in name and "expert" not in name, name))


def _others_changed(
    checkpoint: Checkpoint, layers: Collection[MoeLayer], name: str, value: int
) -> set[str]:
    """Tensors that change with the field and are no expert's; experts that do not count too."""
    try:
        config = with_field(checkpoint.config, name, value)
        state = skeleton.build(checkpoint.cls, config, checkpoint.dtype).state_dict()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return {f"what {name} must divide"}
    same = {n for n, t in checkpoint.state.items() if n in state and state[n].shape == t.shape}
    changed = checkpoint.state.keys() - same
    experts = tuple(f"{layer.experts}." for layer in layers)
    own = {n for n in changed if n.startswith(experts)}
    if not all(any(n.startswith(prefix) for n in own) for prefix in experts):
        return changed - own or {"no experts"}
    return changed - own
