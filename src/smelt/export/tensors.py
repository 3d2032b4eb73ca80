"""A checkpoint's tensors as llama.cpp names and lays them, read a layer's experts at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import gguf
import torch
from torch import Tensor

from smelt.checkpoint.bind import MoeLayer, find_layers, read_bank
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError
from smelt.export.architectures import Target

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_BANK = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}


@dataclass(frozen=True)
class Part:
    """Tensors of the file that are read together: a plain one, or the experts of a layer."""

    shapes: dict[str, tuple[int, ...]]  # by GGUF name, in the order of `read`
    read: Callable[[], list[Tensor]]
    heads: frozenset[str] = frozenset()  # names that make logits


def list_parts(checkpoint: Checkpoint, target: Target) -> list[Part]:
    """Every tensor of the file, in order; nothing is read yet.

    Raises:
        CheckpointError: a weight that the architecture has no place for.
    """
    return [part for block in checkpoint.blocks for part in _block_parts(checkpoint, target, block)]


def _block_parts(checkpoint: Checkpoint, target: Target, block: str) -> Iterator[Part]:
    layers = {layer.block: layer for layer in find_layers(checkpoint.model)}
    own = layers.get(block) if block else None
    names = _names(checkpoint, target, own)
    is_tied = checkpoint.config.get_text_config().tie_word_embeddings
    for state_name in checkpoint.blocks[block]:
        if own is not None and state_name.startswith(own.experts + "."):
            continue
        name = names(state_name)
        if name == _HEAD and is_tied and target.shares_embedding:
            continue
        is_head = name == _HEAD or (name == _EMBEDDING and is_tied and target.shares_embedding)
        yield Part(
            {name: tuple(checkpoint.state[state_name].shape)},
            partial(_read_one, checkpoint, target, state_name),
            frozenset({name} if is_head else ()),
        )
    if own is not None:
        index = _index_of(checkpoint, block)
        yield _experts(checkpoint, own, index)
        yield from _zeros(checkpoint, target, own, index)


def _index_of(checkpoint: Checkpoint, block: str) -> int:
    return [name for name in checkpoint.blocks if name].index(block)


def _names(checkpoint: Checkpoint, target: Target, layer: MoeLayer | None) -> Callable[[str], str]:
    """GGUF names of state names, by the gguf library's own table."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    count = len([name for name in checkpoint.blocks if name])
    table = gguf.get_tensor_name_map(kinds[target.name], count)

    def find(state_name: str) -> str:
        if layer is not None:
            index = _index_of(checkpoint, layer.block)
            special = {
                f"{layer.router}.weight": f"blk.{index}.ffn_gate_inp.weight",
                f"{layer.router}.e_score_correction_bias": f"blk.{index}.exp_probs_b.bias",
            }
            if state_name in special:
                return special[state_name]
        found = table.get_name(state_name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CheckpointError(
                f"{checkpoint.folder}: {state_name} has no place in llama.cpp's {target.name}. "
                "Nothing was written."
            )
        return found

    return find


def _read_one(checkpoint: Checkpoint, target: Target, state_name: str) -> list[Tensor]:
    tensor = checkpoint.read(state_name)
    config = checkpoint.config.get_text_config()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = state_name.split(".")[-2]
    if target.interleaves_rotary and module in heads:
        return [interleave(tensor, heads[module])]
    return [tensor]


def interleave(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of queries or keys, so that what turns together lies side by side.

    transformers turns row i of a head with row i + half; llama.cpp's `llama` rows 2i and 2i + 1.
    """
    halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _experts(checkpoint: Checkpoint, layer: MoeLayer, index: int) -> Part:
    module = checkpoint.model.get_submodule(layer.experts)
    shapes = read_bank(module, layer.experts, checkpoint.state.__getitem__).tensors()

    def read() -> list[Tensor]:
        bank = read_bank(module, layer.experts, checkpoint.read).tensors()
        return [bank[name] for name in _BANK]

    if set(shapes) != set(_BANK):
        raise CheckpointError(
            f"{checkpoint.folder}: {layer.experts} has {', '.join(shapes)}, and the architecture "
            f"{', '.join(_BANK)}."
        )
    return Part(
        {f"blk.{index}.{new}.weight": tuple(shapes[old].shape) for old, new in _BANK.items()}, read
    )


def _zeros(checkpoint: Checkpoint, target: Target, layer: MoeLayer, index: int) -> Iterator[Part]:
    """What the architecture wants and the model does not have, so that it adds nothing."""
    D = checkpoint.config.get_text_config().hidden_size
    F = checkpoint.state[f"{layer.experts}.down_proj"].shape[2]
    shapes: dict[str, tuple[int, ...]] = {}
    if target.zero_shared_expert:
        shapes |= {"ffn_gate_shexp.weight": (F, D), "ffn_up_shexp.weight": (F, D)}
        shapes |= {"ffn_down_shexp.weight": (D, F)}
    if target.zero_selection_bias:
        shapes |= {"exp_probs_b.bias": (layer.num_experts,)}
    for name, shape in shapes.items():
        yield Part({f"blk.{index}.{name}": shape}, partial(_zero, shape))


def _zero(shape: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape)]
