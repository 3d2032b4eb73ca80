"""How long forwards and decode steps take: the models of one ground in turns, in one process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smelt.bench.clock import Times, timed
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.comparison.costs import inputs_of
from smelt.comparison.peak import peak_memory
from smelt.comparison.schedule import Progress
from smelt.comparison.settings import ComparisonRecipe
from smelt.comparison.tables import timed_cells
from smelt.errors import RecipeError
from smelt.study.store import write

STEPS = 16
"""Tokens written in a timing of decode steps."""


def measure_latency(
    study: ComparisonRecipe,
    only: str | None = None,
    *,
    threads: int = 1,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Milliseconds and peak memory of every row whose weights were kept (`latency` of the recipe).

    Forward: of `batch` sequences of `length` tokens, as many to write as to read. Step: the mean of
    16 tokens written one after another with a cache. The fastest of all turns; the models take
    turns at every batch, so that whatever else the machine does falls on all of them alike.

    Returns:
        what is written to OUTPUT/latency.json: `rows` by variant, and how it was measured.
    """
    cells = timed_cells(study, only)
    if study.latency is None or not cells:
        raise RecipeError(
            "Nothing to time: name a ground and a seed as latency in the recipe, and run it first "
            "(weights of those cells are kept)."
        )
    own, folder = study.latency, Progress(study).works.folder
    torch.set_num_threads(threads)
    models = {
        cell.variant: load_model(Checkpoint.open(folder(cell))).float().eval() for cell in cells
    }
    jobs = {
        f"{what}, batch {batch}": (make, batch)
        for batch in own.batches
        for what, make in (("forward", _forward), ("step", _steps))
    }
    times: dict[str, dict[str, Times]] = {name: {job: Times() for job in jobs} for name in models}
    device, total = torch.device("cpu"), own.turns + 1
    for turn in range(total):
        for job, (make, batch) in jobs.items():
            for name, model in models.items():
                run, count = make(model, inputs_of(model, batch, own.length))
                taken = timed(run, device, count)
                if turn:  # the first one warms up
                    times[name][job].add(taken)
        progress("timing", turn + 1, total)
    rows: dict[str, dict[str, Any]] = {
        name: {f"ms, {job}": round(1e3 * one.least, 3) for job, one in own_times.items()}
        for name, own_times in times.items()
    }
    for done, cell in enumerate(cells, 1):
        taken_bytes = peak_memory(folder(cell), max(own.batches), own.length)
        rows[cell.variant]["peak MB"] = round(taken_bytes["peak"] / 1e6, 1)
        progress("memory", done, len(cells))
    found = {
        "ground": own.task,
        "seed": own.seed,
        "length": own.length,
        "turns": own.turns,
        "threads": threads,
        "rows": rows,
        "medians": {n: {j: t.median for j, t in one.items()} for n, one in times.items()},
    }
    write(Progress(study).store.folder / "latency.json", found)
    return found


Job = tuple[Callable[[], object], int]
"""What is timed, and how often it does what is counted."""


def _forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Job:
    @torch.no_grad()
    def run() -> None:
        model(**inputs, use_cache=False)

    return run, 1


@torch.no_grad()
def _steps(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Job:
    """Tokens after one another; what is read before them is read outside of the timing."""
    token = inputs["input_ids"][:, :1]
    given: dict[str, Any] = {}
    if model.config.is_encoder_decoder:
        encoder: Any = model.get_encoder()
        given["encoder_outputs"] = encoder(input_ids=inputs["input_ids"])
        name, cache = "decoder_input_ids", None
    else:
        name = "input_ids"
        cache = model(**inputs, use_cache=True).past_key_values

    @torch.no_grad()
    def run() -> None:
        known = cache
        for _ in range(STEPS):
            asked = {name: token, "past_key_values": known, "use_cache": True, **given}
            known = model(**asked).past_key_values

    return run, STEPS
