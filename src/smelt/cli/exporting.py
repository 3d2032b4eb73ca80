"""Checkpoints for others: SaMoE frozen into a stock family, a stock one as a GGUF file."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, disk_bytes, keeping, number, size
from smelt.errors import RecipeError

if TYPE_CHECKING:
    from smelt.export.gguf_file import Written
    from smelt.samoe.convert import Exported


def export(
    source: Annotated[
        str,
        typer.Argument(help="A SaMoE checkpoint of `smelt train`, or for GGUF a stock one."),
    ],
    destination: Annotated[str, typer.Argument(help="The folder to make, or OUT.gguf.")],
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write a stock checkpoint as one GGUF file.")
    ] = False,
    quantise: Annotated[
        str | None,
        typer.Option(
            "--quantise",
            help="GGUF: Q8_0, Q6_K, Q5_K, Q4_K, Q3_K or Q2_K, by llama.cpp [the weights' type].",
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="SaMoE: the family to write [qwen3_moe].")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16 [the source's]."),
    ] = None,
    verify: options.Verify = True,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a checkpoint that loads elsewhere: SaMoE as a stock family, a stock one as GGUF.

    A SaMoE model is frozen into an ordinary MoE checkpoint. What layers share is written out for
    each of them, so the result is larger: by how much is reported. A stock checkpoint, compressed
    or not, becomes a GGUF file for llama.cpp. Whatever would compute something else there is
    refused. docs/export.md says what can be exported, and how exact it is.

    Example: smelt export runs/samoe frozen

    Example: smelt export small small-q4.gguf --quantise Q4_K
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    if gguf or quantise is not None or Path(destination).suffix == ".gguf":
        if to is not None:
            raise RecipeError("--to names a family for SaMoE; a GGUF file keeps its own.")
        _to_gguf(screen, source, destination, quantise, dtype, verify, trust_remote_code)
        return
    from smelt.samoe.convert import export as run

    with keeping(destination), screen.watching() as stages:
        done = run(
            source,
            destination,
            to=to or "qwen3_moe",
            dtype=dtype,
            verify=verify,
            progress=stages("exporting"),
        )
    value = {**asdict(done), "bytes_on_disk": disk_bytes(done.folder), "seconds": screen.seconds}
    screen.result(value, _words(done, destination, screen.seconds))


def _to_gguf(
    screen: Screen,
    source: str,
    destination: str,
    quantise: str | None,
    dtype: str | None,
    verify: bool,
    trust_remote_code: bool,
) -> None:
    from smelt import api

    with screen.watching() as stages:
        done = api.export_gguf(
            source,
            destination,
            quantise=quantise,
            dtype=dtype,
            verify=verify,
            trust_remote_code=trust_remote_code,
            progress=stages("exporting"),
        )
    value = {**asdict(done), "seconds": screen.seconds}
    screen.result(value, _gguf_words(done, source, destination, screen.seconds))


def _gguf_words(done: "Written", source: str, shown: str, seconds: float) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in done.types.items())
    lines = [
        f"{done.num_tensors} tensors of {done.architecture} ({kinds})",
        f"{size(done.bytes_before)} of weights → {size(done.num_bytes)} on disk, in {seconds} s",
    ]
    if done.wider:
        lines.append(
            f"{len(done.wider)} tensors are stored wider than {done.scheme}, because their rows do "
            f"not divide into its blocks: {_few(done.wider)}"
        )
    lines += [f"Note: {note}" for note in done.notes]
    return "\n".join([*lines, f"Written to {shown}", "", f"Next:  smelt evaluate {source} {shown}"])


def _few(names: tuple[str, ...]) -> str:
    """The kinds of tensors among these, without the numbers of their blocks."""
    kinds = dict.fromkeys(
        ".".join(part for part in name.split(".") if part != "blk" and not part.isdigit())
        for name in names
    )
    return ", ".join(kinds)


def _words(done: "Exported", shown: str, seconds: float) -> str:
    grown = done.params_after / done.params_before
    sizes = (
        f"{number(done.params_before)} → {number(done.params_after)} parameters ({grown:.2g} ×), "
        f"{size(done.bytes_before)} → {size(done.bytes_after)} of weights in {done.dtype}, "
        f"in {seconds} s"
    )
    lines = [
        f"{done.experts_before} stored experts written out as {done.experts_after} ({done.to})",
        sizes,
    ]
    if set(done.beta_products) != {1.0}:
        least, most = min(done.beta_products), max(done.beta_products)
        words = f"β: the stream is divided by its products, {least:.3g} to {most:.3g}; the norms' ε"
        lines.append(f"{words} is not, so logits differ a little (docs/export.md)")
    lines += [
        f"Written to {shown}",
        "",
        f"Next:  smelt inspect {shown}",
        f"       smelt compress {shown} OUT --keep 0.5",
    ]
    return "\n".join(lines)
