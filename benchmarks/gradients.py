"""Gradient norm and signal-to-noise of an expert against the number of experts.

    python benchmarks/gradients.py [--experts 1,4,8,16,32,64] [--steps 0,100] [--seeds 1]
        [--variants none,pool] [--figure gradients.svg]

AR-MoE (`none`) and SaMoE (`pool`, P = 2), or any other sharing rule, of one size, trained from the
same seed on the same batches by a bare loop (AdamW, warm-up, clipping), and looked at before the
first step and after so many. The gradient is that of the training loss on held-out text, by
`smelt.analyse.gradients`: an expert as it is stored gets the sum of what all its layers send it.
Quick by default; what a longer run is for is named by --steps, --width, --blocks and --seeds.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor

from _report import machine, save, show
from smelt.analyse import figures
from smelt.analyse.draw_gradients import over_experts
from smelt.analyse.gradients import gradient_flow, report
from smelt.analyse.runs import NAMES
from smelt.analyse.summary import spread
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.model import SaMoEForCausalLM
from smelt.text import parse_source, tokenize
from smelt.train.data import train_tokenizer

Record = dict[str, Any]
FIGURES = ("norm", "snr", "tokens")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    text = Text(options)
    records: list[Record] = []
    for seed in range(options.seeds):
        for experts in options.experts:
            for sharing in options.variants:
                for record in look(sharing, experts, seed, text, options):
                    records.append(record)
                    took = f"{record['seconds']} s, loss {record['loss']:.3f}"
                    print(f"{sharing}, E {experts}, seed {seed}, step {record['step']}: {took}")
    rows = table(records)
    for step in options.steps:
        header = ("", "E", "norm", "SNR", "tokens", "one layer: norm", "SNR ", "alignment")
        cells = [row["cells"] for row in rows if row["step"] == step]
        show(
            f"Per expert, after {step} steps (mean ± sd over {options.seeds} seeds)", header, cells
        )
    settings = {name: value for name, value in vars(options).items() if name != "figure"}
    about = {"machine": machine(options.threads), "settings": settings}
    save("gradients", about | {"records": records})
    if options.figure is not None:
        draw(records, options.figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )

    def ints(words: str) -> list[int]:
        return [int(word) for word in words.split(",")]

    parser.add_argument("--experts", type=ints, default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--steps", type=ints, default=[0, 100])
    parser.add_argument("--variants", type=lambda w: w.split(","), default=["none", "pool"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--pool", type=int, default=2, help="P")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument(
        "--batch", type=int, default=8, help="sequences of a step and a micro-batch"
    )
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="draw it, as an SVG file")
    options = parser.parse_args()
    options.steps = sorted(set(options.steps))
    return options


class Text:
    """Batches to train on and micro-batches to look at, the same for every model."""

    def __init__(self, options: argparse.Namespace) -> None:
        train, held_out = parse_source("python:train:prose"), parse_source("python:held-out:prose")
        self.tokenizer = train_tokenizer([train], vocab_size=1024)
        steps = max(options.steps[-1], 1)
        self.train = self._rows(train, steps * options.batch, options)
        self.held_out = self._rows(held_out, options.micro_batches * options.batch, options)

    def _rows(self, source: Any, rows: int, options: argparse.Namespace) -> list[Tensor]:
        blocks = tokenize(
            [source],
            self.tokenizer,
            num_tokens=(rows + 1) * options.length,
            sequence_length=options.length,
        )
        full = blocks.input_ids[blocks.mask.all(1)][:rows].to(options.device)
        batches = list(full.split(options.batch))
        return [one for one in batches if len(one) == options.batch]


def look(
    sharing: str, experts: int, seed: int, text: Text, options: argparse.Namespace
) -> Iterator[Record]:
    """Train one model, and look at its gradients at the steps that were asked for."""
    torch.manual_seed(seed)
    config = SaMoEConfig.from_preset(
        "paper",
        sharing=sharing,
        num_experts=experts,
        pool_size=options.pool,
        vocab_size=len(text.tokenizer),
        hidden_size=options.width,
        num_hidden_layers=options.blocks,
        num_attention_heads=4,
        max_position_embeddings=options.length,
    )
    model = SaMoEForCausalLM(config).to(options.device)
    batches = [{"input_ids": ids, "labels": ids} for ids in text.held_out]
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed)).tolist()
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95))
    done, begin = 0, time.perf_counter()
    for step in options.steps:
        batches_due = [text.train[order[i % len(order)]] for i in range(done, step)]
        train(model, optimiser, batches_due, done, options)
        done = step
        found = report(gradient_flow(model, batches))
        yield {
            "sharing": sharing,
            "experts": experts,
            "seed": seed,
            "step": step,
            "loss": found["loss"]["mean"],
            "stored": found["experts_stored"]["mean"],
            "by_layer": found["experts_by_layer"]["mean"],
            "alignment": [one["alignment"] for one in found["contributions"]],
            "seconds": round(time.perf_counter() - begin, 1),
        }


def train(
    model: SaMoEForCausalLM,
    optimiser: torch.optim.Optimizer,
    batches: Sequence[Tensor],
    done: int,
    options: argparse.Namespace,
) -> None:
    """The steps of these batches."""
    model.train()
    for number, ids in enumerate(batches, done + 1):
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * min(1.0, number / 20)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()


def table(records: Sequence[Record]) -> list[Record]:
    """One row per variant, E and step."""
    rows = []
    for key in dict.fromkeys((r["step"], r["sharing"], r["experts"]) for r in records):
        own = [r for r in records if (r["step"], r["sharing"], r["experts"]) == key]
        columns = [[r["stored"][name] for r in own] for name in FIGURES]
        columns += [[r["by_layer"][name] for r in own] for name in FIGURES[:2]]
        columns.append([x for r in own for x in r["alignment"]])
        cells = [NAMES[key[1]], key[2], *(spelt(spread(column)) for column in columns)]
        rows.append({"step": key[0], "cells": cells})
    return rows


def spelt(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.3g}" + ("" if found["sd"] is None else f" ± {found['sd']:.1g}")


def draw(records: Sequence[Record], path: Path) -> None:
    """The stored expert's figures against E, a line per variant and step."""
    import matplotlib

    variants = []
    for key in dict.fromkeys((r["sharing"], r["step"], r["experts"]) for r in records):
        own = [r for r in records if (r["sharing"], r["step"], r["experts"]) == key]
        spreads = {name: spread([r["stored"][name] for r in own]) for name in FIGURES}
        label = f"{NAMES[key[0]]}, step {key[1]}"
        variants.append(
            {
                "without_experts": label,
                "num_experts": key[2],
                "gradients": {"per_stored_expert": spreads},
            }
        )
    with matplotlib.rc_context(figures.STYLE):
        figure = over_experts({"variants": variants})
        if figure is not None:
            figure.savefig(path)
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
