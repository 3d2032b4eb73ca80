"""The command that looks into a checkpoint: `inspect`."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smelt.cli import options
from smelt.cli.screen import Screen, counts, number, size
from smelt.errors import RecipeError
from smelt.outputs import check_new

if TYPE_CHECKING:
    from smelt.checkpoint.describe import Description
    from smelt.checkpoint.source import Checkpoint
    from smelt.compress.facts import Facts
    from smelt.compress.outlook import Outlook


def inspect(
    source: options.Source,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the weights with their SHA-256 checksums.")
    ] = False,
    stable_rank: Annotated[
        bool, typer.Option("--stable-rank", help="Also how many directions each expert uses.")
    ] = False,
    beside: Annotated[
        str | None,
        typer.Option("--beside", help="With --stable-rank: the checkpoint it was made from."),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="With --stable-rank: draw it (svg, png or pdf).")
    ] = None,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what is in a checkpoint, and what a smaller one would save. Reads no weights.

    With --stable-rank the experts are read, a layer at a time.

    Example: smelt inspect Qwen3-30B-A3B
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    _check_ranks(beside, figure, is_asked=stable_rank)
    from smelt.api import open_checkpoint
    from smelt.checkpoint.describe import describe
    from smelt.checkpoint.verify import verify as verify_files
    from smelt.compress.facts import read_facts
    from smelt.compress.outlook import legal_counts, outlook
    from smelt.compress.pipeline import is_decomposed
    from smelt.evaluate.results import markdown

    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    facts = read_facts(checkpoint)
    about = describe(checkpoint, facts.anatomy)
    verified = None
    if verify:
        with screen.watching() as stages:
            verified = verify_files(checkpoint.folder, stages("verify"))
    value: dict[str, Any] = about.to_dict() | {"verified_files": verified}
    text = _about(about, verified)
    if about.num_stored == about.num_experts and not is_decomposed(checkpoint, facts):
        found = outlook(facts.layers, facts.other_bytes)
        legal = legal_counts(facts.layers[0])
        value |= {"legal_experts": legal, "outlook": [vars(one) for one in found]}
        text += _outlook(found, legal, about.num_experts[0], markdown)
    if stable_rank:
        ranks, words = _ranks(checkpoint, facts, beside, figure, screen)
        value |= {"stable_rank": ranks}
        text += words
    screen.result(value, text)


def _check_ranks(beside: str | None, figure: Path | None, *, is_asked: bool) -> None:
    """Refuse options that say nothing, and figures that cannot be drawn."""
    if not is_asked and (beside is not None or figure is not None):
        raise RecipeError("--beside and --figure belong to --stable-rank: give that too.")
    if figure is None:
        return
    if figure.suffix not in (".svg", ".png", ".pdf"):
        raise RecipeError(f"{figure}: a figure is .svg, .png or .pdf.")
    check_new(figure)
    if find_spec("matplotlib") is None:
        raise RecipeError(
            "--figure needs matplotlib, which is not installed: pip install 'smelt[report]'."
        )


def _ranks(
    checkpoint: "Checkpoint",
    facts: "Facts",
    beside: str | None,
    figure: Path | None,
    screen: Screen,
) -> tuple[dict[str, Any], str]:
    """The stable ranks of the experts, as a value and as words."""
    from smelt.api import open_checkpoint
    from smelt.compress.facts import read_facts
    from smelt.evaluate.ranks import mean_ratio, rank_rows, stable_ranks
    from smelt.evaluate.results import markdown

    with screen.watching() as stages:
        found = stable_ranks(checkpoint, facts, stages("stable ranks"))
        before = None
        if beside is not None:
            original = open_checkpoint(beside)
            known = read_facts(original)
            if [one.matrices.keys() for one in known.layers] != [
                one.matrices.keys() for one in facts.layers
            ]:
                raise RecipeError(
                    f"{beside}: has other MoE layers than {checkpoint.folder}, so this was not "
                    "made from it."
                )
            before = stable_ranks(original, known, stages("stable ranks of the original"))
    value: dict[str, Any] = {"layers": found}
    words = f"\n{markdown(rank_rows(found, before))}"
    if before is not None:
        ratio = mean_ratio(found, before)
        value |= {"before": before, "mean_ratio": ratio}
        words += f"\nOn average {ratio:.2f} times that of the original's experts.\n"
    if figure is not None:
        from smelt.analyse.draw_ranks import stable_ranks as draw

        name = checkpoint.folder.name
        draw({"before": before, "after": found} if before else {name: found}).savefig(figure)
        words += f"Drawn in {figure}\n"
    return value, words


def _about(about: "Description", verified: int | None) -> str:
    stored = about.quantised or about.dtype
    files = f"{about.num_files} file" + "s" * (about.num_files > 1)
    lines = [
        about.folder,
        f"{about.architecture} ({about.family}), {stored}, {files}, {size(about.num_bytes)}",
        f"{number(about.num_params)} parameters, {number(about.num_active_params)} used per token",
        "",
        f"{about.num_blocks} blocks: {len(about.layers)} MoE layers"
        + (
            f" in {about.num_blocks - about.num_dense_blocks} of them"
            if about.num_dense_blocks
            else ""
        )
        + f", {counts(about.num_experts)} experts each, {about.top_k} per token, "
        f"{about.router} router",
    ]
    if about.num_stored != about.num_experts:
        lines.append(f"stored: {counts(about.num_stored)} experts per layer (mapped form)")
    lines += [f"- {fact}" for fact in about.facts]
    lines.append("")
    for part, num_bytes in about.bytes_by_part.items():
        if num_bytes:
            share = num_bytes / about.num_bytes
            lines.append(f"{part:>17}  {size(num_bytes):>8}  {share:6.1%}")
    if about.made is not None:
        made = about.made
        words = (
            f"Made by smelt from {made.source}: {counts(made.experts_before)} → "
            f"{counts(made.experts_after)} experts per layer ({made.method}, {made.form} form), "
            f"{size(made.bytes_before)} before"
        )
        lines += ["", words]
    if verified is not None:
        unknown = about.num_files - verified
        lines.append("")
        if verified:
            lines.append(f"{verified} of {about.num_files} files match their SHA-256 checksums.")
        if unknown:
            lines.append(f"No checksum is known for {unknown} of them: damage cannot be told.")
    return "\n".join(lines) + "\n"


def _outlook(found: "list[Outlook]", legal: list[int], num_experts: int, markdown: Any) -> str:
    rows = [
        {
            "keep": f"{one.keep:.0%}",
            "experts": one.experts,
            "bytes": size(one.bytes_after),
            "saved": f"{one.saved:.0%}",
            "note": None if one.is_exact else "nearest that the router can hold",
        }
        for one in found
    ]
    if len(legal) == num_experts - legal[0] + 1:
        allowed = f"{legal[0]} to {num_experts}"
    else:
        allowed = ", ".join(map(str, legal))
    return (
        f"\nA stock checkpoint of this family can have {allowed} experts per layer; the mapped "
        f"form any count.\n\n{markdown(rows)}"
    )
