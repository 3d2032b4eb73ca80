"""The memory of one forward: `python -m smelt.comparison.peak FOLDER BATCH LENGTH` prints bytes.

A process of its own, so that the peak is that of this model and nothing else.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

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
    before = _resident("VmRSS")
    model = load_model(checkpoint).float().eval()
    give_memory_back()
    after = _resident("VmRSS")
    _forget_peak()
    with torch.no_grad():
        model(**inputs_of(model, batch, length), use_cache=False)
    found = {"weights": after - before, "peak": _resident("VmHWM") - before}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _resident(name: str) -> int:
    """Bytes by the kernel's table; elsewhere the peak so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak() -> None:
    """The kernel begins anew to note the peak; where it cannot, loading counts too."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
