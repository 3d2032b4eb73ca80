"""What healing costs beside training the student alone: memory, time of a step, the mask step.

    python benchmarks/healing.py [--quick] [--turns N] [--batch-size B] [--steps N] [--only NAMES]
                                 [--folder DIR]

A random checkpoint is compressed to half its experts (mapped form). Every variant is a process of
its own, in turns, one thread:

    alone      cross-entropy only; no teacher in memory, none asked
    cached     with the teacher's kept predictions, made by an earlier process
    cold       the same, made in the same process (the teacher is walked block by block)
    live       the teacher in memory
    decompose  cached, and rows of S pruned at every step; its twin without pruning is `open`

Memory is the process's `ru_maxrss`, all of it: libraries, text, saving too. Bound: cached at most
1.1 × alone. Times are processor time of the one thread (the machine may be busy with something
else), medians over steps of all turns. The mask step is choosing and applying the masks (bound:
below 2 % of a step of 4,096 tokens); the running mean of |S·∂L/∂S| is beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"

from _checkpoints import write_checkpoint
from _report import machine, save, show

MIB = 1 << 20
SHAPE = {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
    "vocab_size": 16_384,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_experts": 8, "vocab_size": 4096}
SETTINGS = {
    "text": {"tokens": 32_768, "held_out_tokens": 2048, "sequence_length": 256},
    "steps": 8,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "checkpoint_every": 8,
    "log_every": 1,
}
QUICK = {
    "text": {"tokens": 4096, "held_out_tokens": 1024, "sequence_length": 128},
    "steps": 6,
    "batch_size": 4,
}
PRUNED = {"rank": 32, "initial": 0.0, "final": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "alone": {"distill": {"weight": 0.0}, "cache": {}},
    "cached": {"cache": {}},
    "cold": {"cache": {}},
    "live": {},
    "open": {"cache": {}, "decompose": {**PRUNED, "keep": 1.0}},
    "decompose": {"cache": {}, "decompose": PRUNED},
}

JOB = """
import json, sys, time
from smelt.train import heal_rows
from smelt.train.heal import HealRecipe, heal
spent, at = {"observe": [], "prune": []}, []
def timed(name):
    own = getattr(heal_rows.PrunedRows, name)
    def wrapper(self, *arguments):
        begin = time.process_time()
        own(self, *arguments)
        spent[name].append(time.process_time() - begin)
    setattr(heal_rows.PrunedRows, name, wrapper)
timed("observe"); timed("prune")
heal(HealRecipe.model_validate_json(sys.argv[1]), on_step=lambda *_: at.append(time.process_time()))
steps = [b - a for a, b in zip(at, at[1:])]
open(sys.argv[2], "w").write(json.dumps({"steps": steps, **spent}))
"""
"""The measured process: one healing."""


def measure(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One healing in a process of its own: its peak and its times."""
    out = folder / "out"
    file = folder / "times.json"
    words = [sys.executable, "-c", JOB, json.dumps({**recipe, "output": str(out)}), str(file)]
    job = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(job.pid, 0)
    job.returncode = os.waitstatus_to_exitcode(status)
    if job.returncode:
        raise SystemExit(f"{recipe}: healing failed (exit status {job.returncode}).")
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return {**json.loads(file.read_text()), "peak": usage.ru_maxrss << 10}


def pair(shape: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """A random original and half of its experts."""
    from smelt import api

    original = write_checkpoint(folder / "original", shape, "float32")
    settings = {"text": ["python"], "num_tokens": 4096, "sequence_length": 256}
    keep = {"keep": 0.5, "form": "mapped", "align": "none"}
    return original, api.compress(original, folder / "student", **keep, **settings)


def run(
    shape: dict[str, Any], settings: dict[str, Any], names: list[str], turns: int, folder: Path
) -> None:
    os.environ["SMELT_CACHE"] = str(folder / "cache")
    original, student = pair(shape, folder)
    recipe = {"teacher": str(original), "student": str(student), **settings}
    measure({**recipe, "cache": {}}, folder)  # text and predictions lie in the cache from here on
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(turns):
        for name, ones in found.items():
            own = {**recipe, **VARIANTS[name]}
            if name == "cold":
                own["cache"] = {"folder": str(folder / f"cold-{turn}")}
            ones.append(measure(own, folder))
            print(f"{turn + 1}/{turns} {name}", file=sys.stderr)
    parts = {name: summary(ones) for name, ones in found.items()}
    alone = parts["alone"]
    header = ["variant", "peak MiB", "× alone", "step ms", "× alone"]
    rows = [
        [n, p["peak"] / MIB, p["peak"] / alone["peak"], p["step"] * 1e3, p["step"] / alone["step"]]
        for n, p in parts.items()
    ]
    tokens = settings["batch_size"] * settings["text"]["sequence_length"]
    show(f"Healing, {tokens:,} tokens a step", header, rows)
    if own := parts.get("decompose"):
        show_mask_step(own)
    shape_of = {"shape": shape, "settings": settings, "turns": turns}
    save("healing", {"machine": machine(1), "of": shape_of, "variants": parts})


def show_mask_step(own: dict[str, float]) -> None:
    """Its share of a step, and that of the running mean."""
    show(
        "The mask step",
        ["choose and apply ms", "share of a step", "running mean ms", "share of a step"],
        [
            [
                own["prune"] * 1e3,
                own["prune"] / own["step"],
                own["observe"] * 1e3,
                own["observe"] / own["step"],
            ]
        ],
    )


def summary(ones: list[dict[str, Any]]) -> dict[str, float]:
    """Of all turns: the highest peak; medians over steps, the first ones left out."""
    return {"peak": max(one["peak"] for one in ones)} | {
        name[:-1] if name == "steps" else name: median(
            [value for one in ones for value in one[name][1:]] or [0.0]
        )
        for name in ("steps", "observe", "prune")
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants; alone is the measure")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    size, settings = (
        ({**SHAPE, **SMALL}, {**SETTINGS, **QUICK}) if given.quick else (SHAPE, SETTINGS)
    )
    asked = {"batch_size": given.batch_size, "steps": given.steps}
    settings |= {name: value for name, value in asked.items() if value}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        run(size, settings, given.only.split(","), given.turns, Path(name))
