"""The commands that measure what a checkpoint costs to run: `smelt bench decode`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smelt.cli import options
from smelt.cli.screen import Screen
from smelt.errors import RecipeError

if TYPE_CHECKING:
    from smelt.bench.decode import DecodeSettings
    from smelt.bench.records import Decoded

bench = typer.Typer(
    name="bench",
    help="Measure what checkpoints cost to run, side by side.",
    no_args_is_help=True,
    add_completion=False,
)


@bench.callback()
def _group() -> None:
    """Measure what checkpoints cost to run, side by side."""


@bench.command()
def decode(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoint folders or hub ids.")],
    batch: Annotated[str, typer.Option("--batch", help="Sequences at a time.")] = "1,8,64,256",
    context: Annotated[str, typer.Option("--context", help="Tokens in the cache.")] = "0,512",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="float32 (the default on a CPU), bfloat16 (on a GPU) or float16."
        ),
    ] = None,
    skip_alpha: Annotated[
        list[float] | None,
        typer.Option(
            "--skip-alpha",
            help="Measure SaMoE checkpoints also without the pool entries whose |α| is below this. "
            "Repeat for more thresholds.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Turns of every checkpoint.")] = 5,
    threads: Annotated[int, typer.Option("--threads", help="Of the processor.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save every number, as JSON.")
    ] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time cached decode steps of checkpoints in turns, beside the floors of this machine.

    A step's floor is the larger of its bytes at the measured rate of reading weights and its FLOPs
    at the measured rate of products of as many rows; all in one dtype and on one device.

    Example: smelt bench decode small wide --batch 1,64 --context 0
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    batches, contexts = _numbers("--batch", batch), _numbers("--context", context)
    if output is not None and output.exists():
        raise RecipeError(f"{output}: exists. smelt overwrites nothing: name another file.")
    from transformers import logging

    logging.disable_progress_bar()  # transformers' own bars: ours say enough
    from smelt.bench import decode as measuring
    from smelt.bench.records import save
    from smelt.bench.subjects import load, parse_dtype
    from smelt.checkpoint.device import check_device

    chosen = check_device(device or "cpu")
    settings = measuring.DecodeSettings(
        batches=batches,
        contexts=contexts,
        turns=repeats,
        skip_alpha=tuple(skip_alpha or ()),
        dtype=parse_dtype(dtype, chosen),
        device=chosen,
        threads=threads,
        seed=seed or 0,
    )
    measuring.check(settings)
    subjects = [
        load(one, dtype=settings.dtype, device=chosen, trust_remote_code=trust_remote_code)
        for one in checkpoints
    ]
    subjects = [replace(s, name=n) for s, n in zip(subjects, _names(checkpoints), strict=True)]
    with screen.watching() as stages:
        found = measuring.measure(subjects, settings, stages("decoding"))
    value = found.to_dict()
    if output is not None:
        save(found, output)
    screen.result(value | {"seconds": screen.seconds}, _report(found, settings, output))


def _names(sources: list[str]) -> list[str]:
    """The shortest ends of the paths that differ: b, or a/seed-0 where there is c/seed-0 too."""
    parts = [Path(source).expanduser().resolve().parts for source in sources]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return sources


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(
            f"{option} {text}: whole numbers with commas between them, such as 1,8,64."
        ) from None


def _report(found: "Decoded", settings: "DecodeSettings", output: Path | None) -> str:
    from smelt.evaluate.results import markdown

    rates, dtype = found.rates, str(settings.dtype).removeprefix("torch.")
    cache = "" if rates.cache is None else f" ({rates.cache / 1e9:.3g} out of the cache)"
    flops = ", ".join(f"{v / 1e9:.3g} at {rows} rows" for rows, v in sorted(rates.flops.items()))
    threads = "" if settings.device.type == "cuda" else f", {settings.threads} thread(s)"
    how = (
        f"{dtype} on {settings.device}{threads}; {settings.turns} turns of {settings.steps} steps; "
        "milliseconds per step: the fastest turn, and the median of the turns\n"
        f"read: {rates.memory / 1e9:.3g} GB/s out of memory{cache}; products: {flops} GFLOP/s"
    )
    saved = f"\nSaved to {output}" if output else ""
    return f"{how}\n\n{markdown(found.rows())}{saved}"
