"""What a run that fits layers has done already, kept in the staging folder until it is complete."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from smelt.checkpoint.shards import write_shard
from smelt.checkpoint.sink import FITS, Sink
from smelt.compress.layer import Changed
from smelt.compress.plan import LayerPlan


@dataclass(frozen=True)
class Known:
    """A block that is done: its layers as they were decided and fitted, and their tensors."""

    layers: list[LayerPlan]
    changed: Changed  # empty where they are in the shard alone


class Done:
    """Notes of fitted blocks, so that a killed run does not fit them again."""

    def __init__(self, sink: Sink, stages: Sequence[str], *, keeps_tensors: bool) -> None:
        """
        Args:
            keeps_tensors: the walk goes on through the compressed blocks, and needs them again.
        """
        self.sink = sink
        self.stages = stages
        self.keeps_tensors = keeps_tensors

    def note(self, stage: str, layers: Sequence[LayerPlan], changed: Sequence[Changed]) -> None:
        """A block is fitted; called before its shard is written."""
        record = self._file(stage, ".json")
        record.parent.mkdir(parents=True, exist_ok=True)
        replaced = sorted(set[str]().union(*(c.replaced for c in changed)))
        if self.keeps_tensors:
            tensors = {name: t for c in changed for name, t in c.tensors.items()}
            write_shard(self._file(stage, ".safetensors"), tensors)
        value = {"layers": [x.model_dump(mode="json") for x in layers], "replaced": replaced}
        part = record.with_name(record.name + ".part")
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(record)

    def read(self, stage: str) -> Known | None:
        """The block, if nothing of it is left to do but to write its shard."""
        record = self._file(stage, ".json")
        has_shard = self.sink.has(self.stages.index(stage), len(self.stages))
        if not record.is_file() or not (has_shard or self.keeps_tensors):
            return None
        value = json.loads(record.read_text(encoding="utf-8"))
        layers = [LayerPlan.model_validate_json(json.dumps(x)) for x in value["layers"]]
        tensors = load_file(self._file(stage, ".safetensors")) if self.keeps_tensors else {}
        return Known(layers, Changed(tensors, frozenset(value["replaced"])))

    def _file(self, stage: str, suffix: str) -> Path:
        folder = self.sink.staging / "smelt" / FITS
        return folder / f"{self.stages.index(stage):05d}{suffix}"
