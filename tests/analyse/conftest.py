"""Tiny models, and run folders such as `smelt train` writes, made in a blink."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from commands import text_file, tokenizer
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM, SaMoEForMaskedLM

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_experts": 4,
    "pool_size": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
}


def make(preset: str = "paper", *, seed: int = 0, **fields: Any) -> SaMoEForCausalLM:
    """A model of three MoE layers (six in the modern preset), its weights far from small."""
    torch.manual_seed(seed)
    config = SaMoEConfig.from_preset(preset, **{**SIZES, **fields})
    kind = SaMoEForCausalLM if config.is_causal else SaMoEForMaskedLM
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("alpha", "beta")) and "norm" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(number: int = 4, rows: int = 2, length: int = 24, *, seed: int = 0) -> list[Any]:
    """Micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (number, rows, length), generator=generator)
    return [{"input_ids": one, "labels": one} for one in ids]


@pytest.fixture(scope="session")
def model() -> Callable[..., SaMoEForCausalLM]:
    return make


@pytest.fixture(scope="session")
def micro_batches() -> Callable[..., list[Any]]:
    return batches


def log_lines(seed: int, layers: int, *, has_alpha: bool) -> list[dict[str, Any]]:
    """A log with every kind of line."""
    lines: list[dict[str, Any]] = []
    for step in (10, 20, 30):
        nats = 6.0 - 0.1 * step / 10 + 0.01 * seed
        line = {"step": step, "tokens": step * 64, "nats": nats, "balance": 3.0}
        details = {"routing_entropy": [0.9] * layers, "dropped": [0.1] * layers}
        if has_alpha:
            details |= {"alpha": [[1.0, 0.1 * step]] * layers, "beta": [1.0] * layers}
        phases = {"router": 1.0, "experts": 4.0 + seed, "attention": 2.0, "optimizer": 3.0}
        lines.append({**line, **details, "phases": phases})
    lines.append({"step": 30, "held_out": {"prose": 5.5 + 0.01 * seed}})
    return lines


def write_run(folder: Path, ground: Path, *, seed: int, log: bool = True, **fields: Any) -> Path:
    """A run folder: weights, tokenizer, recipe and log."""
    net = make(seed=seed, **fields)
    net.save_pretrained(folder)
    tokenizer(ground).save_pretrained(folder)
    recipe = {
        "model": {"model_type": "samoe", **fields},
        "text": {
            "train": ["python"],
            "held_out": [{"kind": "files", "location": str(text_file(ground))}],
            "sequence_length": 32,
        },
        "objective": "causal",
        "batch_size": 2,
        "seed": seed,
        "output": str(folder),
    }
    (folder / "smelt").mkdir()
    (folder / "smelt" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if log:
        layers = len(net.config.layout.layers)
        lines = log_lines(seed, layers, has_alpha=net.config.layout.is_mixed)
        (folder / "smelt" / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: `samoe/seed-0`, `samoe/seed-1`, `ar`; text: `text.txt`."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write_run(folder / "samoe" / f"seed-{seed}", folder, seed=seed, sharing="pool")
    write_run(folder / "ar", folder, seed=0, sharing="none", num_experts=8)
    return folder


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    return write_run


def finite(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
