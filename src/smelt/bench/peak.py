"""Loading and peak memory of one checkpoint: `python -m smelt.bench.peak JSON` prints both.

A process of its own, so that memory and time are those of this checkpoint and nothing else.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from smelt.bench.clock import synchronise
from smelt.bench.resident import forget_peak, resident
from smelt.bench.state import CONTEXTS, State, last_logits
from smelt.bench.subjects import DTYPES, in_memory
from smelt.checkpoint.device import give_memory_back
from smelt.checkpoint.source import Checkpoint
from smelt.errors import SmeltError

_READ = 16 << 20


@dataclass(frozen=True)
class Job:
    """What is loaded, and what runs to see the peak."""

    source: str
    dtype: str
    device: str
    batch: int
    context: int
    length: int
    threads: int
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Loaded:
    """Seconds and bytes; bytes are beyond what the process held before it read the checkpoint."""

    load_seconds: float  # from files in the page cache to weights on the device
    weights_memory_bytes: int
    load_peak_bytes: int
    peak_memory_bytes: int


def measure(job: Job) -> Loaded:
    """Load and run a checkpoint in a fresh process.

    Raises:
        SmeltError: it cannot be loaded, or there is not the memory to run it.
    """
    words = [sys.executable, "-m", "smelt.bench.peak", json.dumps(asdict(job))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Loaded(**json.loads(done.stdout.splitlines()[-1]))
    said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    if done.returncode < 0:
        said = f"the process was ended by signal {-done.returncode}, as for want of memory"
    raise SmeltError(
        f"{job.source}: its memory cannot be measured at batch {job.batch}, context {job.context} "
        f"and length {job.length} ({said})."
    )


def main(words: list[str]) -> int:
    """Load, run, say what it took."""
    job = Job(**json.loads(words[0]))
    device, dtype = torch.device(job.device), DTYPES[job.dtype]
    torch.set_num_threads(job.threads)
    small = torch.zeros(64, 64, dtype=dtype, device=device)
    small @ small  # what the libraries take is not the model's
    try:
        checkpoint = Checkpoint.open(job.source, trust_remote_code=job.trust_remote_code)
        checkpoint.check()
        _read(checkpoint.folder)
        found = _measured(job, checkpoint, device, dtype)
    except (SmeltError, MemoryError, torch.OutOfMemoryError) as error:
        sys.stderr.write(f"{str(error).strip().splitlines()[0]}\n")
        return 2
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
    return 0


def _measured(job: Job, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Loaded:
    before = _now(device)
    _forget(device)
    begin = time.perf_counter()
    model = in_memory(checkpoint, dtype, device)
    synchronise(device)
    seconds = time.perf_counter() - begin
    load_peak = _most(device)
    give_memory_back()
    weights = _now(device)
    _forget(device)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(vocabulary, shape, generator=generator).to(device)

    with torch.inference_mode():
        if job.length and not model.config.is_encoder_decoder:
            model(draw(1, job.length), use_cache=True, **last_logits(model))
        if job.batch:
            state = State(model, draw(min(job.batch, CONTEXTS), job.context), job.batch)
            state.step(draw(job.batch, 1))
    synchronise(device)
    return Loaded(seconds, weights - before, load_peak - before, _most(device) - before)


def _read(folder: Path) -> None:
    """Read the weight files once: a load is timed from the page cache, not from a cold disk."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            while handle.read(_READ):
                pass


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return resident("VmRSS")


def _most(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident("VmHWM")


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
