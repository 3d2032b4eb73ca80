"""The memory of one forward: `python -m smelt.comparison.peak FOLDER BATCH LENGTH` prints bytes.

A process of its own, so that the peak is that of this model and nothing else.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from smelt.bench.resident import forget_peak, resident
from smelt.checkpoint.device import give_memory_back
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.comparison.costs import inputs_of
from smelt.errors import SmeltError


def peak_memory(folder: str | Path, batch: int, length: int) -> dict[str, int]:
    """Bytes of a forward in a fresh process: `weights` in memory, and `peak` with activations.

    Both beyond what the process held before it read the checkpoint.
    """
    words = [sys.executable, "-m", "smelt.comparison.peak", str(folder), str(batch), str(length)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise SmeltError(f"{folder}: its memory cannot be measured ({said[-1] if said else ''}).")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(words: list[str]) -> int:
    """Load, run once, say what it took."""
    folder, batch, length = words[0], int(words[1]), int(words[2])
    torch.set_num_threads(1)
    torch.zeros(64, 64) @ torch.zeros(64, 64)  # what the libraries take is not the model's
    checkpoint = Checkpoint.open(folder)
    before = resident("VmRSS")
    model = load_model(checkpoint).float().eval()
    give_memory_back()
    after = resident("VmRSS")
    forget_peak()
    with torch.no_grad():
        model(**inputs_of(model, batch, length), use_cache=False)
    found = {"weights": after - before, "peak": resident("VmHWM") - before}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
