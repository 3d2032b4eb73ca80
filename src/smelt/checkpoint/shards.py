"""The safetensors files of a folder: headers checked on opening, tensors read one at a time.

Reads go straight from the file into the tensor's own memory (no mapped pages stay behind), so that
a fused parameter can be filled expert by expert without a second copy.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smelt.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 512 << 20


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, offset in bytes, type and shape."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, checked against the file's own size."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        entries = {key: _entry(file, 8 + length, spec) for key, spec in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}). "
            "It is damaged or not safetensors: download it again and compare checksums."
        ) from None
    end = max((e.offset + e.num_bytes for e in entries.values()), default=8 + length)
    if end != size:
        raise CheckpointError(
            f"{file}: {size} bytes, its header says {end}. "
            "The file was truncated or damaged: download it again and compare checksums."
        )
    return entries


def _entry(file: Path, start: int, spec: Mapping[str, Any]) -> Entry:
    dtype, shape = spec["dtype"], tuple(int(n) for n in spec["shape"])
    begin, end = spec["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"tensor type {dtype!r} is not one of {', '.join(DTYPES)}")
    entry = Entry(file, start + begin, DTYPES[dtype], shape)
    if end - begin != entry.num_bytes or begin < 0 or min(shape, default=0) < 0:
        raise ValueError(f"shape {list(shape)} of {dtype} does not fill {end - begin} bytes")
    return entry


def list_tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder by its key, from the index or the single file."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            if not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError("weight_map does not give a file name for each tensor")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a readable index ({error}).") from None
        return _from_index(folder, weight_map)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return read_header(found[0])
    pickles = sorted(p.name for p in folder.glob("*.bin")) + [
        p.name for suffix in ("pt", "pth", "ckpt") for p in sorted(folder.glob(f"*.{suffix}"))
    ]
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickled weights ({pickles[0]} …). smelt reads safetensors only, "
            "because a pickle can run code: convert it with save_pretrained, then "
            "try again."
        )
    raise CheckpointError(
        f"{folder}: no {SINGLE} and no {INDEX}. Give a folder that save_pretrained wrote, or a "
        "hub id."
    )


def _from_index(folder: Path, weight_map: Mapping[str, str]) -> dict[str, Entry]:
    headers: dict[str, dict[str, Entry]] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX}: shard {name!r} lies outside the folder.")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: shard {name} is missing, the index names it. "
                "The download is incomplete: fetch that file."
            )
        headers[name] = read_header(folder / name)
    absent = [key for key, name in weight_map.items() if key not in headers[name]]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX}: names {len(absent)} tensors that their shard does not hold, first "
            f"{absent[0]!r} in {weight_map[absent[0]]}. Index and shards are of "
            "different checkpoints."
        )
    return {key: headers[name][key] for key, name in weight_map.items()}


def read_into(entry: Entry, out: Tensor) -> None:
    """Fill `out` (contiguous, CPU, the entry's dtype and shape) from the file."""
    assert out.is_contiguous() and out.dtype == entry.dtype and out.shape == entry.shape
    if entry.num_bytes == 0:
        return
    view = as_bytes(out)
    done = 0
    with entry.file.open("rb", buffering=0) as handle:
        handle.seek(entry.offset)
        while done < len(view):
            count = handle.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{entry.file}: ends before tensor data does: truncated.")
            done += count


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read(entry: Entry) -> Tensor:
    """One tensor, in memory of its own."""
    out = torch.empty(entry.shape, dtype=entry.dtype)
    read_into(entry, out)
    return out


def write_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header bytes of a safetensors file with these tensors, in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file whole or not at all (temporary name, flushed, renamed).

    Returns its SHA-256.
    """
    temporary = file.with_name(file.name + ".writing")
    with temporary.open("wb") as handle:
        header = write_header({k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()})
        handle.write(header)
        digest = hashlib.sha256(header)
        for tensor in tensors.values():
            data = as_bytes(tensor.contiguous().cpu())
            handle.write(data)
            digest.update(data)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
    return digest.hexdigest()
