"""The type of each tensor in a GGUF file, and numbers as the bytes of it."""

import math
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smelt.errors import CheckpointError, RecipeError
from smelt.export.engine import quantise_rows

Kind = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Scheme:
    """What a file's matrices are stored as."""

    name: str
    matrix: Kind
    head: Kind  # of the output head, or the embedding where it serves as one
    file_type: gguf.LlamaFileType

    @property
    def is_quantised(self) -> bool:
        """Whether llama.cpp is needed to write it."""
        return self.matrix not in (Kind.F32, Kind.F16, Kind.BF16)


PLAIN = {
    torch.float32: Scheme("F32", Kind.F32, Kind.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: Scheme("F16", Kind.F16, Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: Scheme("BF16", Kind.BF16, Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
"""Schemes by the type of the weights."""

QUANTISED = {
    "Q8_0": Scheme("Q8_0", Kind.Q8_0, Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "Q6_K": Scheme("Q6_K", Kind.Q6_K, Kind.Q6_K, gguf.LlamaFileType.MOSTLY_Q6_K),
    "Q5_K": Scheme("Q5_K", Kind.Q5_K, Kind.Q6_K, gguf.LlamaFileType.MOSTLY_Q5_K_S),
    "Q4_K": Scheme("Q4_K", Kind.Q4_K, Kind.Q6_K, gguf.LlamaFileType.MOSTLY_Q4_K_S),
    "Q3_K": Scheme("Q3_K", Kind.Q3_K, Kind.Q6_K, gguf.LlamaFileType.MOSTLY_Q3_K_S),
    "Q2_K": Scheme("Q2_K", Kind.Q2_K, Kind.Q6_K, gguf.LlamaFileType.MOSTLY_Q2_K_S),
}
"""Schemes by the name that --quantise takes. Every matrix gets the one type, but for the head,
which has six bits in llama.cpp's own schemes too. None uses an importance matrix."""

WIDER = {
    Kind.Q6_K: Kind.Q8_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q3_K: Kind.Q4_0,
    Kind.Q2_K: Kind.Q4_0,
}
"""What llama.cpp takes for a matrix whose rows are no multiple of 256; float16 beyond that."""

_CHUNK = 1 << 24
"""Numbers that are in float32 at a time while they are quantised."""

_SMALL = ("ffn_gate_inp", "exp_probs_b", "_norm", ".bias", "ffn_gate_inp_shexp")
"""Kept in float32: they are small, and routing hangs on them."""


def find_scheme(quantise: str | None, dtype: torch.dtype) -> Scheme:
    """The scheme that was asked for; without one, that of the weights' own type.

    Raises:
        RecipeError: no scheme of that name.
    """
    if quantise is None:
        return PLAIN.get(dtype, PLAIN[torch.float32])
    if quantise.upper() not in QUANTISED:
        raise RecipeError(f"--quantise {quantise}: say one of {', '.join(QUANTISED)}.")
    return QUANTISED[quantise.upper()]


def type_of(name: str, shape: tuple[int, ...], scheme: Scheme, *, is_head: bool) -> Kind:
    """The type of one tensor: the scheme's where its rows divide into blocks, else a wider one."""
    if len(shape) < 2 or any(part in name for part in _SMALL):
        return Kind.F32
    wanted = scheme.head if is_head else scheme.matrix
    for kind in (wanted, WIDER.get(wanted, Kind.F16)):
        if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return Kind.F16


def bytes_of(shape: tuple[int, ...], kind: Kind) -> int:
    """What a tensor takes in a type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def encode(name: str, tensor: Tensor, kind: Kind) -> NDArray[np.uint8]:
    """A tensor as the bytes of a type, a matrix at a time.

    Raises:
        CheckpointError: a number that float16 cannot hold.
    """
    flat = tensor.reshape(-1, tensor.shape[-1])
    if kind == Kind.F32:
        return flat.float().contiguous().numpy().view(np.uint8)
    if kind == Kind.BF16:
        return flat.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if kind == Kind.F16:
        half = flat.to(torch.float16).contiguous()
        if bool(half.isinf().any()):
            raise CheckpointError(
                f"{name}: holds numbers beyond float16's 65,504. Export in bfloat16 or float32."
            )
        return half.numpy().view(np.uint8)
    row_bytes = bytes_of((flat.shape[1],), kind)
    out = np.empty((flat.shape[0], row_bytes), np.uint8)
    step = max(1, _CHUNK // flat.shape[1])
    for begin in range(0, len(flat), step):
        rows = flat[begin : begin + step].float().numpy()
        out[begin : begin + step] = quantise_rows(rows, int(kind), row_bytes)
    return out
