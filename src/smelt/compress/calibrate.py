"""One pass over calibration text: the routing statistics of every MoE layer, and their files."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smelt import processes
from smelt.checkpoint.bind import MoeLayer, find_layers, input_width
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.observe import watch
from smelt.checkpoint.shards import as_bytes, write_shard
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.verify import finite
from smelt.checkpoint.walk import Stage, Walk
from smelt.compress.fisher_files import FisherSums
from smelt.errors import CalibrationError
from smelt.routing import Accumulator, LayerStats

Progress = Callable[[str, int, int], None]
"""Told (block, done, total) as a walk goes on."""


@dataclass(frozen=True)
class RoutingStats:
    """The statistics of every MoE layer of a checkpoint, bound to it and to the text by hashes."""

    layers: dict[str, LayerStats]
    checkpoint: str  # fingerprint of the checkpoint
    text: str  # hash of the token ids and mask
    num_tokens: int
    details: dict[str, Any] = field(default_factory=dict)
    fisher: FisherSums | None = None  # squared gradients of all expert weights; on request

    @property
    def sha256(self) -> str:
        """A hash of every number here."""
        digest = hashlib.sha256(f"{self.checkpoint} {self.text}".encode())
        for name, layer in self.layers.items():
            for key, tensor in layer.tensors().items():
                digest.update(f"{name} {key} {tuple(tensor.shape)}".encode())
                digest.update(as_bytes(tensor.contiguous()))
        if self.fisher is not None:
            digest.update(
                f"{self.fisher.num_sequences} {sorted(self.fisher.digests.items())}".encode()
            )
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """One safetensors file per layer (two with gradients), and stats.json, written last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {
            "version": 1,
            "smelt": version("smelt"),
            "checkpoint": self.checkpoint,
            "text": self.text,
            "num_tokens": self.num_tokens,
            "details": self.details,
            "layers": {},
        }
        for number, (name, layer) in enumerate(self.layers.items()):
            file = f"layer-{number:03d}.safetensors"
            write_shard(folder / file, layer.tensors())
            index["layers"][name] = {"file": file, "num_tokens": layer.num_tokens}
        if self.fisher is not None:
            index["fisher"] = self.fisher.save(folder)
        part = folder / "stats.json.part"
        part.write_text(json.dumps(index, indent=1) + "\n")
        part.replace(folder / "stats.json")

    @classmethod
    def load(cls, folder: str | Path) -> "RoutingStats":
        """The statistics of a folder.

        Raises:
            CalibrationError: no statistics there, or a file of them is damaged.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / "stats.json").read_text())
            layers = {
                name: LayerStats.from_tensors(load_file(folder / at["file"]), at["num_tokens"])
                for name, at in index["layers"].items()
            }
            return cls(
                layers,
                index["checkpoint"],
                index["text"],
                index["num_tokens"],
                index["details"],
                FisherSums.load(folder, index["fisher"]) if "fisher" in index else None,
            )
        except FileNotFoundError as error:
            raise CalibrationError(
                f"{folder}: no statistics there ({Path(str(error.filename)).name} is missing). "
                "Make them with `smelt calibrate`."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CalibrationError(
                f"{folder}: the statistics cannot be read ({error}). Calibrate again."
            ) from None

    def merge(self, other: "RoutingStats") -> "RoutingStats":
        """The statistics of both texts together, as if calibrated on one after the other."""
        if self.checkpoint != other.checkpoint:
            raise CalibrationError(
                "The statistics are of different checkpoints: they do not add up."
            )
        layers = {name: layer.merge(other.layers[name]) for name, layer in self.layers.items()}
        text = hashlib.sha256(f"{self.text} {other.text}".encode()).hexdigest()
        tokens = self.num_tokens + other.num_tokens
        fisher = self.fisher.merge(other.fisher) if self.fisher and other.fisher else None
        return RoutingStats(layers, self.checkpoint, text, tokens, self.details, fisher)

    def belongs_to(self, checkpoint: Checkpoint) -> None:
        """Raise CalibrationError if these are the statistics of another checkpoint."""
        if self.checkpoint != checkpoint.fingerprint:
            raise CalibrationError(
                f"The statistics are of checkpoint {self.checkpoint[:12]}…, {checkpoint.folder} is "
                f"{checkpoint.fingerprint[:12]}…. Calibrate this checkpoint first."
            )


def calibrate(
    checkpoint: Checkpoint,
    batches: Sequence[Batch],
    *,
    text: str,
    device: str = "cpu",
    sample_tokens: int = 4096,
    seed: int = 0,
    input_gram: bool = False,
    hidden_on_cpu: bool = False,
    details: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> RoutingStats:
    """The statistics of every MoE layer, from one walk that ends after the last of them.

    Args:
        batches: the text as inputs (`checkpoint.inputs.make_batches`). Several processes, each
            given all of them, share them out.
        text: hash of the text, kept with the result.
        sample_tokens: inputs of each layer kept for refits and layer errors, the same tokens for
            every method, drawn by `seed`.
        input_gram: also collect Σ x xᵀ [D, D].
    """
    layers = find_layers(checkpoint.model)
    collector = Collector(layers, batches, sample_tokens, seed, input_gram)
    walk = Walk(
        checkpoint,
        [batches[index].inputs for index in collector.share],
        device=device,
        hidden_on_cpu=hidden_on_cpu,
        read=lambda name: finite(checkpoint.folder, name, checkpoint.read(name)),
    )
    order = [name for name in checkpoint.blocks if name]
    done = 0

    @contextlib.contextmanager
    def visit(stage: Stage) -> Iterator[None]:
        nonlocal done
        with collector.watching(stage):
            yield
        done += 1
        if progress:
            progress(stage.name, done, len(order))

    for _ in walk.run(visit, until=last_block(layers, order)):
        raise AssertionError("the walk ends before any output")
    num_tokens = sum(int(b.mask.sum()) for b in batches)
    found = collector.of_all_processes([layer.name for layer in layers])
    return RoutingStats(found, checkpoint.fingerprint, text, num_tokens, details or {})


def last_block(layers: Sequence[MoeLayer], order: Sequence[str]) -> str:
    """The last block with a MoE layer: a walk for statistics ends there."""
    return max((layer.block for layer in layers), key=order.index)


class Collector:
    """Collects the statistics of the layers of whatever block is being walked."""

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        batches: Sequence[Batch],
        sample_tokens: int,
        seed: int,
        input_gram: bool,
    ) -> None:
        self.layers = layers
        self.batches = batches
        self.sample_tokens = sample_tokens
        self.seed = seed
        self.input_gram = input_gram
        self.share = processes.share(len(batches))  # of this process, which walks no others
        self.stats: dict[str, LayerStats] = {}

    @contextlib.contextmanager
    def watching(self, stage: Stage) -> Iterator[None]:
        """Within: the stage's layers are watched; after it their statistics are in `stats`."""
        model = stage.walk.model
        sums: dict[str, Accumulator] = {}
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                if layer.block == stage.name:
                    width = input_width(model.get_submodule(layer.experts))
                    sums[layer.name] = Accumulator(
                        layer.num_experts, width, with_input_gram=self.input_gram
                    )
                    rows = self._rows(layer, stage)
                    stack.enter_context(watch(model, layer, rows, sums[layer.name]))
            yield
        for name, accumulator in sums.items():
            self.stats[name] = accumulator.result()

    def of_all_processes(self, names: Sequence[str]) -> dict[str, LayerStats]:
        """The statistics of these layers over the batches of all processes."""
        found = {}
        for name in names:
            first, *others = processes.everybodys(self.stats.pop(name))
            for other in others:
                first = first.merge(other)
            found[name] = first
        return found

    def _rows(self, layer: MoeLayer, stage: Stage) -> Callable[[], tuple[Tensor | None, Tensor]]:
        """For the batch now running: its real tokens (None: all), and which are sampled."""
        masks = [batch.side(layer.block).flatten() for batch in self.batches]
        counts = [int(mask.sum()) for mask in masks]
        total = sum(counts)
        generator = torch.Generator().manual_seed(self.seed)
        picked = torch.randperm(total, generator=generator)[: self.sample_tokens].sort().values
        starts = [sum(counts[:i]) for i in range(len(counts))]

        def rows() -> tuple[Tensor | None, Tensor]:
            # A walk may hold a second stream of the same batches.
            index = self.share[stage.walk.current % len(self.share)]
            start, count, mask = starts[index], counts[index], masks[index]
            real = None if count == mask.numel() else torch.where(mask)[0].to(stage.walk.device)
            here = picked[(picked >= start) & (picked < start + count)] - start
            return real, here

        return rows
