"""A tiny checkpoint and its calibration, as the pipeline's tests share them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from checkpoints import save
from smelt.checkpoint import mapped
from smelt.checkpoint import sink as sinks
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.source import Checkpoint
from smelt.compress.apply import apply
from smelt.compress.calibrate import RoutingStats, calibrate
from smelt.compress.facts import Facts, read_facts
from smelt.compress.pipeline import run_plan
from smelt.compress.plan import Plan
from smelt.compress.walking import apply_walking
from smelt.recipe import CompressRecipe

TOKENS = torch.randint(3, 90, (8, 24), generator=torch.Generator().manual_seed(1))


def batches(size: int, *, padding: int = 0) -> list[Batch]:
    """The same tokens, `size` sequences at a time, with padding behind them."""
    ids = torch.nn.functional.pad(TOKENS, (0, padding))
    mask = torch.nn.functional.pad(torch.ones_like(TOKENS, dtype=torch.bool), (0, padding))
    found = []
    for start in range(0, len(ids), size):
        rows = slice(start, start + size)
        inputs = {"input_ids": ids[rows]}
        if padding:
            inputs["attention_mask"] = mask[rows].long()
        found.append(Batch(inputs, mask[rows]))
    return found


@dataclass(frozen=True)
class Ground:
    """A checkpoint on disk, opened and calibrated."""

    folder: Path
    checkpoint: Checkpoint
    facts: Facts
    stats: RoutingStats

    @classmethod
    def make(
        cls,
        folder: Path,
        family: str = "qwen3_moe",
        given: list[Batch] | None = None,
        **settings: Any,
    ) -> "Ground":
        mapped.register()
        save(family, folder, **settings)
        return cls.at(folder, given)

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path) -> "Ground":
        model.save_pretrained(folder)
        return cls.at(folder)

    @classmethod
    def at(cls, folder: Path, given: list[Batch] | None = None) -> "Ground":
        checkpoint = Checkpoint.open(folder)
        stats = calibrate(checkpoint, given or batches(2), text="tokens", sample_tokens=64)
        return cls(folder, checkpoint, read_facts(checkpoint), stats)

    def recipe(self, out: Path, **settings: Any) -> CompressRecipe:
        settings = {"experts": 4, "method": "m-smoe"} | settings
        return CompressRecipe(source=str(self.folder), output=str(out), **settings)

    def plan(self, out: Path, **settings: Any) -> Plan:
        return run_plan(self.checkpoint, self.stats, self.recipe(out, **settings), self.facts)

    def compress(self, out: Path, **settings: Any) -> Path:
        plan = self.plan(out, **settings)
        fits = plan.recipe.reconstruct
        if plan.method.sequential or (fits is not None and fits.inputs == "walk"):
            return apply_walking(
                self.checkpoint, plan, out, batches=batches(2), stats=self.stats, facts=self.facts
            )
        return apply(self.checkpoint, plan, out, stats=self.stats, facts=self.facts)


@contextmanager
def dies_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> Iterator[None]:
    """Within: the run is killed when it would write one shard more than so many."""
    written = 0
    write = sinks.Sink.write

    def dies(self: sinks.Sink, index: int, count: int, tensors: Any) -> None:
        nonlocal written
        if written == shards:
            raise KeyboardInterrupt
        written += 1
        write(self, index, count, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(sinks.Sink, "write", dies)
        try:
            yield
        except KeyboardInterrupt:
            return
    raise AssertionError("it was not killed")
