"""Whether the weight files of a checkpoint hold the bytes that they should, where that is known.

A flipped bit in a weight is a weight like any other: only a checksum from elsewhere tells. There is
one in smelt's own outputs, in the hub's cache (a file is named by its SHA-256) and in a folder that
`hf download --local-dir` filled.
"""

import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from smelt.checkpoint.shards import INDEX, SINGLE
from smelt.errors import CheckpointError

SUMS = "smelt/sha256.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def known_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 that each weight file should have, by name; those nobody noted are left out."""
    own = _own_sums(folder / SUMS)
    sums = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = own.get(file.name) or _cached_sum(file) or _downloaded_sum(folder, file.name)
        if found:
            sums[file.name] = found
    missing = sorted(name for name in own if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{folder}: {missing[0]} is missing, {SUMS} names it. The copy is incomplete: "
            "fetch that file."
        )
    return sums


def verify(folder: Path, progress: Callable[[str, int, int], None] | None = None) -> int:
    """Compare every weight file with its known checksum; returns how many files there were.

    Raises:
        CheckpointError: a file does not hold the bytes it should. Names every such file.
    """
    sums = known_sums(folder)
    damaged = []
    with ThreadPoolExecutor() as pool:  # hashing and reading both let other threads run
        digests = pool.map(lambda name: _digest(folder / name), sums)
        for done, (name, digest) in enumerate(zip(sums, digests, strict=True), start=1):
            if digest != sums[name]:
                damaged.append(name)
            if progress:
                progress(name, done, len(sums))
    if damaged:
        raise CheckpointError(
            f"{folder}: {', '.join(damaged)} does not match its SHA-256 checksum. The file was "
            "damaged or changed since it was written: fetch it again (--no-verify reads it anyway)."
        )
    return len(sums)


def finite(folder: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor itself.

    Raises:
        CheckpointError: it holds NaN or Inf. One pass, at about the speed of memory.
    """
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return tensor
    low, high = tensor.aminmax()  # NaN goes through to both
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise CheckpointError(
            f"{folder}: {name} holds NaN or Inf. The weights are damaged or training diverged: "
            "compare the folder with its source."
        )
    return tensor


def num_weight_files(folder: Path) -> int:
    """Weight files in the folder, whether a checksum of them is known or not."""
    single = (folder / SINGLE).is_file() and not (folder / INDEX).is_file()
    return 1 if single else len(list(folder.glob("*.safetensors")))


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _own_sums(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        sums = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in sums.items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: not readable checksums ({error}).") from None


def _cached_sum(file: Path) -> str | None:
    """The hub's cache links a file to a blob that is named by its SHA-256."""
    name = file.resolve().name if file.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


def _downloaded_sum(folder: Path, name: str) -> str | None:
    """`hf download --local-dir` notes commit, SHA-256 and time, a line each."""
    note = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    if not note.is_file():
        return None
    lines = note.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None
