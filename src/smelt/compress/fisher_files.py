"""Squared gradients of every expert weight: as large as the experts, so read a layer at a time."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from smelt.checkpoint.shards import as_bytes, write_shard
from smelt.errors import CalibrationError


@dataclass(frozen=True)
class FisherSums:
    """Σ over sequences of squared gradients, by layer, by the names of an ExpertBank's tensors.

    Each [E, …], float32. Divided by `num_sequences` they are the diagonal of the empirical Fisher.
    """

    num_sequences: int
    digests: Mapping[str, str]  # by layer: a hash of every number
    read: Callable[[str], Mapping[str, Tensor]]

    @classmethod
    def of(cls, num_sequences: int, sums: Mapping[str, Mapping[str, Tensor]]) -> "FisherSums":
        """Sums that are in memory."""
        digests = {layer: _digest(tensors) for layer, tensors in sums.items()}
        return cls(num_sequences, digests, sums.__getitem__)

    def save(self, folder: Path) -> dict[str, Any]:
        """One file per layer; returns what `load` needs beside them."""
        files = {}
        for number, (layer, digest) in enumerate(self.digests.items()):
            file = f"fisher-{number:03d}.safetensors"
            write_shard(folder / file, {n: t.contiguous() for n, t in self.read(layer).items()})
            files[layer] = {"file": file, "sha256": digest}
        return {"num_sequences": self.num_sequences, "layers": files}

    @classmethod
    def load(cls, folder: Path, index: Mapping[str, Any]) -> "FisherSums":
        """The inverse of `save`; a layer's file is read, and held against its hash, when asked."""
        layers = index["layers"]

        def read(layer: str) -> Mapping[str, Tensor]:
            file = folder / layers[layer]["file"]
            try:
                tensors = load_file(file)
            except Exception as error:  # whatever is wrong with a file
                raise CalibrationError(f"{file}: cannot be read ({error}).") from None
            if _digest(tensors) != layers[layer]["sha256"]:
                raise CalibrationError(
                    f"{file}: is not the file that these statistics were saved with. Calibrate "
                    "again with --gradients."
                )
            return tensors

        return cls(index["num_sequences"], {n: at["sha256"] for n, at in layers.items()}, read)

    def merge(self, other: "FisherSums") -> "FisherSums":
        """The sums over the sequences of both."""
        sums = {
            layer: {n: t + other.read(layer)[n] for n, t in self.read(layer).items()}
            for layer in self.digests
        }
        return FisherSums.of(self.num_sequences + other.num_sequences, sums)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(as_bytes(tensors[name].cpu().contiguous()))
    return digest.hexdigest()
