"""Reading checkpoints that are published only quantised: fp8 in blocks, and mxfp4.

A quantised tensor is presented under the name and shape of the tensor it stands for, in bf16, and
is dequantised when it is read: one expert's matrix or one fused parameter at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smelt.checkpoint.shards import Entry, read, read_into
from smelt.errors import CheckpointError

READABLE = ("fp8", "mxfp4")

# The sixteen values of FP4 (E2M1): sign, two exponent bits, one mantissa bit.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Plain:
    """A tensor stored as it is."""

    entry: Entry

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def num_bytes(self) -> int:
        return self.entry.num_bytes

    def read(self) -> Tensor:
        return read(self.entry)

    def read_into(self, out: Tensor) -> None:
        read_into(self.entry, out)


@dataclass(frozen=True)
class BlockFp8:
    """An fp8 matrix with one scale per block of rows and columns (DeepSeek-V3's format)."""

    values: Entry
    scales: Entry
    block: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def num_bytes(self) -> int:
        return self.values.num_bytes + self.scales.num_bytes

    def read(self) -> Tensor:
        values, scales = read(self.values), read(self.scales)
        if scales.dtype == torch.uint8:  # an exponent, as F8_E8M0 is
            scales = torch.exp2(scales.float() - 127)
        scales = scales.float()
        if scales.numel() > 1:
            rows, columns = values.shape[-2:]
            scales = scales.repeat_interleave(self.block[0], -2)[..., :rows, :]
            scales = scales.repeat_interleave(self.block[1], -1)[..., :columns]
        return (values.float() * scales).to(self.dtype)

    def read_into(self, out: Tensor) -> None:
        out.copy_(self.read())


@dataclass(frozen=True)
class Mxfp4:
    """4-bit values, 32 to a shared power-of-two scale (gpt-oss); it is read as [E, in, out]."""

    blocks: Entry  # [E, out, in / 32, 16] bytes, two values each, low nibble first
    scales: Entry  # [E, out, in / 32] exponents, biased by 127
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups, _ = self.blocks.shape
        return (experts, groups * 32, rows)

    @property
    def num_bytes(self) -> int:
        return self.blocks.num_bytes + self.scales.num_bytes

    def read(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out

    def read_into(self, out: Tensor) -> None:
        blocks, exponents = read(self.blocks), read(self.scales).to(torch.int32) - 127
        values = torch.tensor(_FP4, dtype=self.dtype)
        for expert in range(blocks.shape[0]):
            packed = blocks[expert].to(torch.int32)
            pairs = torch.stack([values[packed & 15], values[packed >> 4]], dim=-1)
            scaled = torch.ldexp(pairs.flatten(-2), exponents[expert, ..., None])
            out[expert] = scaled.flatten(1).T.to(self.dtype)


Stored = Plain | BlockFp8 | Mxfp4


def present(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors of a checkpoint as the model names them, dequantised where they are quantised.

    Raises:
        CheckpointError: a quantisation this module cannot read, by its name.
    """
    quantisation = config.get("quantization_config") or {}
    method = quantisation.get("quant_method")
    if method is None and quantisation:
        method = next(
            (k for k in ("load_in_4bit", "load_in_8bit") if quantisation.get(k)), "unnamed"
        )
    if method is not None and method not in READABLE:
        raise CheckpointError(
            f"The weights are quantised with {method}, which smelt cannot read (it reads bf16, "
            f"fp16, fp32, {' and '.join(READABLE)}). Compress the unquantised checkpoint, then "
            "quantise."
        )
    if method == "fp8":
        block = tuple(quantisation.get("weight_block_size") or (128, 128))
        return _present_fp8(entries, (int(block[0]), int(block[1])))
    if method == "mxfp4":
        return _present_mxfp4(entries)
    odd = [k for k, e in entries.items() if e.dtype.itemsize == 1 and e.dtype.is_floating_point]
    if odd:
        raise CheckpointError(
            f"Tensor {odd[0]} is stored in {entries[odd[0]].dtype}, but config.json names no "
            "quantisation: its scales are unknown."
        )
    return {key: Plain(entry) for key, entry in entries.items()}


def _present_fp8(entries: Mapping[str, Entry], block: tuple[int, int]) -> dict[str, Stored]:
    presented: dict[str, Stored] = {}
    for key, entry in entries.items():
        if key.endswith("_scale_inv"):
            continue
        has_scales = key + "_scale_inv" in entries
        if entry.dtype != torch.float8_e4m3fn:
            if has_scales:
                raise CheckpointError(
                    f"Tensor {key} has scales and is stored in {entry.dtype}: smelt reads fp8 "
                    "(e4m3) there. Compress the unquantised checkpoint."
                )
            presented[key] = Plain(entry)
        elif has_scales:
            presented[key] = BlockFp8(entry, entries[key + "_scale_inv"], block)
        else:
            raise CheckpointError(f"Tensor {key} is fp8, but {key}_scale_inv is not there.")
    return presented


def _present_mxfp4(entries: Mapping[str, Entry]) -> dict[str, Stored]:
    presented: dict[str, Stored] = {}
    for key, entry in entries.items():
        base, _, kind = key.rpartition("_")
        if kind == "scales" and base + "_blocks" in entries:
            continue
        if kind == "blocks":
            if base + "_scales" not in entries:
                raise CheckpointError(f"Tensor {key} is mxfp4, but {base}_scales is not there.")
            presented[base] = Mxfp4(entry, entries[base + "_scales"])
        else:
            presented[key] = Plain(entry)
    return presented
