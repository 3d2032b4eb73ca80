"""Random text, tiny checkpoints, and what plans make of them."""

from pathlib import Path
from typing import Any

import torch

from checkpoints import VOCABULARY
from smelt.checkpoint import mapped
from smelt.checkpoint.inputs import Batch, make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.apply import apply
from smelt.compress.calibrate import RoutingStats, calibrate
from smelt.compress.facts import Facts, read_facts
from smelt.compress.pipeline import run_plan
from smelt.compress.plan import Plan
from smelt.recipe import CompressRecipe
from smelt.text import TokenBlocks, make_blocks

FORMS: dict[str, dict[str, Any]] = {
    "mapped": {"form": "mapped", "experts": 4},
    "expanded": {"form": "expanded", "experts": 4},
    "stock": {"form": "stock", "experts": 4},
    "reap": {"form": "stock", "experts": 4, "method": "reap"},
}
"""Settings of a compression to half the experts, by name."""


def random_blocks(
    num_rows: int = 6, length: int = 20, *, padding: int = 0, vocabulary: int = VOCABULARY
) -> TokenBlocks:
    """Random sequences, the last one with so many tokens of padding; five bytes a token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (num_rows, length), generator=generator)
    mask = torch.ones(num_rows, length, dtype=torch.bool)
    mask[-1, length - padding :] = False
    return make_blocks(ids, mask, 5 * int(mask.sum()))


def span_batches() -> list[Batch]:
    """Random tokens on both sides of an encoder–decoder, without targets: all real places count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 40), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 30:] = False
    inputs = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "decoder_input_ids": ids[:, :20],
        "decoder_attention_mask": mask[:, :20].long(),
    }
    return [Batch(inputs, mask, mask[:, :20])]


class Material:
    """The tiny checkpoint of a folder, its statistics on random text, and what plans make of it."""

    def __init__(self, folder: Path) -> None:
        mapped.register()
        self.source = Checkpoint.open(folder)
        self.facts: Facts = read_facts(self.source)
        self.blocks = random_blocks(padding=5)
        is_pair = self.source.config.is_encoder_decoder
        self.batches = span_batches() if is_pair else make_batches(self.source, self.blocks, 2)
        self.stats: RoutingStats = calibrate(
            self.source, self.batches, text=self.blocks.sha256, sample_tokens=1000
        )

    def plan(self, **settings: Any) -> Plan:
        recipe = CompressRecipe(
            source=str(self.source.folder), output="out", **{"method": "m-smoe"} | settings
        )
        return run_plan(self.source, self.stats, recipe, self.facts)

    def compress(self, folder: Path, **settings: Any) -> Checkpoint:
        plan = self.plan(**settings)
        done = apply(self.source, plan, folder, stats=self.stats, facts=self.facts)
        return Checkpoint.open(done)
