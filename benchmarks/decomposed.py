"""The decomposed expert layer beside the dense mapped layer that it came from: time, FLOPs, bytes.

    python benchmarks/decomposed.py [--quick] [--turns N] [--shape NAME]

Random weights, one thread, float32, the two in turns, min and median of processor seconds. Layers
are stacked until their factors leave the caches, as they do in a model. The predicted time is the
dense layer's, at the FLOP/s and bytes/s that it reaches: the larger of the two floors. Bound: 1.5 ×
predicted, and never slower than the dense layer.
"""

import argparse
import copy
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

from _report import machine, save, show, times
from smelt.checkpoint.factored import factor_experts
from smelt.checkpoint.mapped import map_experts

TOKENS = (1, 64, 512, 4096)
RANK, KEPT = 32, 0.1


@dataclass(frozen=True)
class Shape:
    """A layer: its experts before and after merging, and their sizes."""

    num_experts: int
    num_stored: int
    top_k: int
    model_size: int
    hidden_size: int
    is_gated: bool
    depth: int  # layers in a stack: their factors do not fit into the caches either

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of every matrix of an expert."""
        D, F = self.model_size, self.hidden_size
        gate = {"gate": (F, D)} if self.is_gated else {}
        return {**gate, "up": (F, D), "down": (D, F)}

    @property
    def dense_params(self) -> int:
        """Of one expert."""
        return sum(rows * columns for rows, columns in self.matrices.values())

    @property
    def factored_params(self) -> int:
        """Of one expert, on average."""
        return sum(RANK * (r + c) + round(KEPT * r) * c for r, c in self.matrices.values())


SHAPES = {
    "Switch-base": Shape(32, 8, 1, 768, 3072, is_gated=False, depth=6),
    "Qwen3-like": Shape(128, 64, 8, 2048, 768, is_gated=True, depth=1),
}


def dense_layer(shape: Shape) -> nn.Module:
    """The mapped experts module of the family."""
    experts: Any
    if shape.is_gated:
        config: Any = Qwen3MoeConfig(
            hidden_size=shape.model_size,
            moe_intermediate_size=shape.hidden_size,
            num_experts=shape.num_stored,
        )
        config._experts_implementation = "grouped_mm"
        experts = Qwen3MoeExperts(config)
    else:
        config = SwitchTransformersConfig(
            d_model=shape.model_size, d_ff=shape.hidden_size, num_experts=shape.num_stored
        )
        experts = SwitchTransformersExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=shape.model_size**-0.5)
    map_experts(experts, shape.num_stored)
    experts.expert_map = torch.arange(shape.num_experts, dtype=torch.int32) % shape.num_stored
    return experts.eval().requires_grad_(False)


def factored_layer(dense: nn.Module, shape: Shape) -> nn.Module:
    """A module of the same sizes in factored form, its kept rows anywhere."""
    experts = copy.deepcopy(dense)
    sizes = {
        m: {"rank": RANK, "rows": shape.num_stored * round(KEPT * rows)}
        for m, (rows, _) in shape.matrices.items()
    }
    factor_experts(experts, sizes)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    for m, (rows, _) in shape.matrices.items():
        kept = [
            torch.randperm(rows)[: round(KEPT * rows)].sort().values + g * rows
            for g in range(shape.num_stored)
        ]
        experts.get_buffer(f"{m}_row_ids").copy_(torch.cat(kept))
    return experts.eval().requires_grad_(False)


def inputs(shape: Shape, num_tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens, choices, weights as the family passes them; and how many stored experts are hit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, shape.model_size, generator=generator)
    scores = torch.rand(num_tokens, shape.num_experts, generator=generator)
    choice = scores.topk(shape.top_k, dim=1).indices
    weight = torch.rand(num_tokens, shape.top_k, generator=generator)
    num_hit = len((choice % shape.num_stored).unique())
    if not shape.is_gated:
        choice = one_hot(choice, shape.num_experts)
    return x, choice, weight, num_hit


def pairs(shape: Shape, choice: Tensor) -> int:
    """Tokens × distinct stored experts: what is computed."""
    ids = choice.argmax(-1) if choice.dim() == 3 else choice
    return int(one_hot(ids % shape.num_stored, shape.num_stored).amax(1).sum())


def timed(layers: list[nn.Module], calls: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Processor seconds of one layer of a stack: what others do on this machine is not counted."""
    start = time.thread_time()
    for layer, call in zip(layers, calls, strict=True):
        layer(*call)
    return (time.thread_time() - start) / len(layers)


@torch.no_grad()
def measure(
    name: str, num_tokens: int, stacks: list[list[nn.Module]], turns: int
) -> dict[str, Any]:
    """Both stacks on the same tokens, in turns; other tokens for every layer and turn."""
    shape, depth = SHAPES[name], len(stacks[0])
    seconds: list[list[float]] = [[], []]
    computed = hit = 0
    for turn in range(-1, turns):
        made = [inputs(shape, num_tokens, seed=100 + turn * depth + i) for i in range(depth)]
        for stack, found in zip(stacks, seconds, strict=True):
            took = timed(stack, [call[:3] for call in made])
            if turn >= 0:  # the first call makes what later ones use
                found.append(took)
        if turn >= 0:
            computed += sum(pairs(shape, call[1]) for call in made)
            hit += sum(call[3] for call in made)
    mean_pairs, mean_hit = computed / turns / depth, hit / turns / depth
    dense, factored = (times(found) for found in seconds)
    flops = [2 * mean_pairs * p for p in (shape.dense_params, shape.factored_params)]
    num_bytes = [4 * mean_hit * p for p in (shape.dense_params, shape.factored_params)]
    predicted = {
        stat: max(flops[1] / (flops[0] / dense[stat]), num_bytes[1] / (num_bytes[0] / dense[stat]))
        for stat in dense
    }
    return {
        "tokens": num_tokens,
        "experts_hit": mean_hit,
        "flops": {"dense": flops[0], "decomposed": flops[1]},
        "bytes_read": {"dense": num_bytes[0], "decomposed": num_bytes[1]},
        "dense_seconds": dense,
        "decomposed_seconds": factored,
        "predicted_seconds": predicted,
        "over_predicted": {stat: factored[stat] / predicted[stat] for stat in dense},
        "over_dense": {stat: factored[stat] / dense[stat] for stat in dense},
        "dense_flops_per_second": flops[0] / dense["min"],
        "dense_bytes_per_second": num_bytes[0] / dense["min"],
    }


def run(name: str, tokens: tuple[int, ...], turns: int) -> list[dict[str, Any]]:
    """One shape at every number of tokens."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    dense = [dense_layer(shape) for _ in range(shape.depth)]
    stacks = [dense, [factored_layer(layer, shape) for layer in dense]]
    found = [measure(name, n, stacks, max(3, turns // (1 + n // 256))) for n in tokens]
    header = (
        "tokens", "dense ms", "decomposed ms", "predicted ms", "÷ predicted", "÷ dense", "medians",
        "MFLOP", "MB read",
    )  # fmt: skip
    rows = [
        (
            f["tokens"],
            1e3 * f["dense_seconds"]["min"],
            1e3 * f["decomposed_seconds"]["min"],
            1e3 * f["predicted_seconds"]["min"],
            f["over_predicted"]["min"],
            f["over_dense"]["min"],
            f"{f['over_predicted']['median']:.2f} {f['over_dense']['median']:.2f}",
            f["flops"]["decomposed"] / 1e6,
            f["bytes_read"]["decomposed"] / 1e6,
        )
        for f in found
    ]
    show(f"Decomposed experts, {name}, rank {RANK}, {KEPT:.0%} of the rows", header, rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two token counts, some seconds")
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--turns", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.shape] if options.shape else list(SHAPES)
    tokens, turns = ((1, 64), 3) if options.quick else (TOKENS, options.turns)
    parts = {
        name: {
            "machine": machine(),
            "shape": asdict(SHAPES[name]) | {"rank": RANK, "kept": KEPT},
            "measured": run(name, tokens, turns),
        }
        for name in names
    }
    if not options.quick:
        save("decomposed", parts)


if __name__ == "__main__":
    main()
