"""The command that measures what checkpoints cost to run: `smelt bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen
from smelt.errors import RecipeError
from smelt.outputs import check_new

if TYPE_CHECKING:
    from smelt.bench.file import Bench
    from smelt.bench.roofline import Rates


def bench(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="[decode|prefill|memory|load]... CHECKPOINT...",
            help="What to measure (everything, if nothing is named), then checkpoint folders or "
            "hub ids.",
        ),
    ],
    batch: Annotated[
        str, typer.Option("--batch", help="Sequences at a time, decoding.")
    ] = "1,8,64",
    context: Annotated[
        str | None, typer.Option("--context", help="Tokens in the cache, decoding. [0,512]")
    ] = None,
    length: Annotated[
        str | None, typer.Option("--length", help="Tokens of a text, prefill. [128,512]")
    ] = None,
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
    """Measure what checkpoints cost to run, in turns, beside the floors of this machine.

    Decode: milliseconds per cached step. Prefill: tokens per second. Memory and load: each in a
    process of its own. A floor is the larger of the bytes at the measured rate of reading weights
    and the FLOPs at the measured rate of products of as many rows. A machine that is not quiet, and
    a model that is too small for its times to tell, are named (docs/benchmarks.md).

    Example: smelt bench original small -o bench.json
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    what, sources = _split(checkpoints)
    batches = _numbers("--batch", batch)
    contexts = None if context is None else _numbers("--context", context)
    lengths = None if length is None else _numbers("--length", length)
    if output is not None:
        check_new(output)
    from transformers import logging

    logging.disable_progress_bar()  # transformers' own bars: ours say enough
    from smelt import api
    from smelt.bench import file

    with screen.watching() as stages:
        found = api.bench(
            sources,
            what=what,
            batches=batches,
            contexts=contexts,
            lengths=lengths,
            dtype=dtype,
            device=device or "cpu",
            threads=threads,
            turns=repeats,
            skip_alpha=skip_alpha or (),
            seed=seed or 0,
            trust_remote_code=trust_remote_code,
            stages=stages,
        )
    if output is not None:
        file.save(found, output)
    screen.result(found.to_dict() | {"seconds": screen.seconds}, _report(found, output))


def _split(words: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """What to measure, and of which checkpoints; a folder of such a name is given as ./decode."""
    names = ("decode", "prefill", "memory", "load")
    sources = list(words)
    what = []
    while sources and sources[0] in names:
        what.append(sources.pop(0))
    if not sources:
        raise RecipeError(
            f"smelt bench {' '.join(words)}: no checkpoint is named. Give folders or hub ids; a "
            f"folder called {words[-1]} is ./{words[-1]}."
        )
    return tuple(dict.fromkeys(what)), sources


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(
            f"{option} {text}: whole numbers with commas between them, such as 1,8,64."
        ) from None


def _report(found: "Bench", output: Path | None) -> str:
    from smelt.bench.records import cost_row, decode_row, prefill_row
    from smelt.evaluate.results import markdown

    own = found.settings
    threads = "" if own["device"].startswith("cuda") else f", {own['threads']} thread(s)"
    parts = [f"{own['dtype']} on {own['device']}{threads}"]
    if found.rates is not None:
        parts[0] += (
            f"; {own['turns']} turns, of {own['steps']} decode steps each; milliseconds of the "
            "fastest turn, and the median of the turns; ± %: how far two runs' medians lie apart, "
            f"by the turns of this one\n{_rates(found.rates)}"
        )
    tables: list[tuple[str, list[dict[str, Any]]]] = [
        ("Checkpoints", [cost_row(one) for one in found.checkpoints]),
        ("Decode", [decode_row(one) for one in found.decode]),
        ("Prefill", [prefill_row(one) for one in found.prefill]),
    ]
    parts += [f"{title}\n\n{markdown(rows).rstrip()}" for title, rows in tables if rows]
    parts += [f"warning: {said}" for said in found.warnings]
    if found.rates is not None and found.quiet["is_quiet"]:
        parts.append("The machine was quiet.")
    if output is not None:
        parts.append(f"Saved to {output}")
    return "\n\n".join(parts)


def _rates(rates: "Rates") -> str:
    cache = "" if rates.cache is None else f" ({rates.cache / 1e9:.3g} out of the cache)"
    flops = ", ".join(f"{v / 1e9:.3g} at {rows} rows" for rows, v in sorted(rates.flops.items()))
    copy = "" if rates.copy is None else f"; copy: {rates.copy / 1e9:.3g} GB/s, read and written"
    return (
        f"floors, from products: read {rates.memory / 1e9:.3g} GB/s out of memory{cache}, "
        f"{flops} GFLOP/s{copy}"
    )
