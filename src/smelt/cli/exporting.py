"""The command that freezes a SaMoE model into an ordinary checkpoint."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, disk_bytes, keeping, number, size

if TYPE_CHECKING:
    from smelt.samoe.convert import Exported


def export(
    source: Annotated[str, typer.Argument(help="A SaMoE checkpoint, as `smelt train` makes one.")],
    destination: Annotated[str, typer.Argument(help="The folder to make.")],
    to: Annotated[str, typer.Option("--to", help="The family to write: qwen3_moe.")] = "qwen3_moe",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16 [the source's]."),
    ] = None,
    verify: options.Verify = True,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Freeze a SaMoE model into an ordinary MoE checkpoint, which loads without smelt.

    What layers share is written out for each of them, so the result is larger: by how much is
    reported. docs/export.md says what can be exported, and how exact it is.

    Example: smelt export runs/samoe frozen
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    from smelt.samoe.convert import export as run

    with keeping(destination), screen.watching() as stages:
        done = run(
            source, destination, to=to, dtype=dtype, verify=verify, progress=stages("exporting")
        )
    value = {**asdict(done), "bytes_on_disk": disk_bytes(done.folder), "seconds": screen.seconds}
    screen.result(value, _words(done, destination, screen.seconds))


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
