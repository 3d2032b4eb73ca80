"""The commands that compress: `compress`, and its steps `calibrate`, `plan` and `apply`."""

from pathlib import Path
from typing import Annotated

import typer

from smelt.cli import options
from smelt.cli.compressed import report_made
from smelt.cli.screen import Screen, keeping
from smelt.errors import RecipeError
from smelt.outputs import check_new

Experts = Annotated[
    int | None, typer.Option("--experts", help="Experts kept per layer.", **options.COUNT)
]
Keep = Annotated[
    float | None,
    typer.Option("--keep", help="Or the share of them: 0.5.", **options.share("--keep")),
]
Size = Annotated[
    float | None,
    typer.Option(
        "--size",
        help="Or the share of their bytes: count and hidden units by measurement.",
        **options.share("--size"),
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="reap, frequency, ean, prune (drop); mone (vectors for experts); m-smoe, "
        "m-smoe-saliency, reap-redirect, hc-smoe, ream, merge-moe, sub-moe, redirect, average, "
        "zipit, repair, git-rebasin, fisher, regmean (merge); auto; or module:function.",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        help="Also decompose experts: low rank and a few whole rows (mapped form; others: --set "
        "decompose.keep=0.1 …).",
    ),
]
HiddenUnits = Annotated[
    int | None,
    typer.Option("--hidden-units", help="Also fewer hidden units in every expert (stock form)."),
]
Sequential = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--one-shot", help="Decide later layers on what the compressed ones say."
    ),
]

Reconstruct = Annotated[
    bool | None,
    typer.Option(
        "--reconstruct/--no-reconstruct",
        help="Fit what is kept of each layer to what the layer did [on] (how: --set "
        "reconstruct.steps=300 …).",
    ),
]


def compress(
    source: Annotated[
        str | None, typer.Argument(help="A checkpoint folder, or a hub id such as org/name.")
    ] = None,
    destination: Annotated[str | None, typer.Argument(help="The folder to make.")] = None,
    experts: Experts = None,
    keep: Keep = None,
    size: Size = None,
    recipe: options.RecipeFile = None,
    method: Method = None,
    form: options.Form = None,
    rank: Rank = None,
    hidden_units: HiddenUnits = None,
    text: options.Texts = None,
    tokens: options.Tokens = None,
    sequential: Sequential = None,
    reconstruct: Reconstruct = None,
    stats: options.Stats = None,
    seed: options.Seed = None,
    device: options.Device = None,
    workers: options.Workers = None,
    settings: options.Sets = None,
    verify: options.Verify = True,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a smaller checkpoint: calibrate, plan and apply in one go.

    A run that was killed goes on where it stopped when the same command is given again.

    Example: smelt compress Qwen3-30B-A3B small --experts 64

    The calibration tokens are shared out among the processes of
    torchrun --nproc-per-node 2 -m smelt compress …
    """
    screen = Screen.of_the_first(as_json=as_json, quiet=quiet)
    given = {
        "source": source,
        "output": destination,
        "experts": experts,
        "keep": keep,
        "size": size,
        "method": method,
        "form": form,
        "rank": rank,
        "hidden_units": hidden_units,
        "text": text,
        "num_tokens": tokens,
        "sequential": sequential,
        "reconstruct": reconstruct,
        "seed": seed,
        "device": device,
        "workers": workers,
        "trust_remote_code": trust_remote_code or None,
    }
    made = options.compress_recipe(recipe, given, settings)
    from smelt import processes
    from smelt.api import compress_by

    with processes.together(), keeping(made.output), screen.watching() as stages:
        folder = compress_by(made, stats=stats, verify=verify, stages=stages)
    report_made(screen, made.source, folder, made.output)


def calibrate(
    source: options.Source,
    stats: Annotated[str, typer.Argument(help="The folder to make, for the statistics.")],
    text: options.Texts = None,
    tokens: options.Tokens = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="Instead of text: training examples of a benchmark, such as sst2 (docs/tasks.md); "
            "--set task.limit=N.",
        ),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            help="Also a backward pass, the whole model in memory: what `--method fisher` and "
            "similarity gradient read.",
        ),
    ] = False,
    seed: options.Seed = None,
    device: options.Device = None,
    settings: options.Sets = None,
    verify: options.Verify = True,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the model over some text once, and keep what its routers and experts did.

    Every plan, at any ratio and by any method, is then made from the statistics in seconds.

    Example: smelt calibrate Qwen3-30B-A3B stats --text notes/ --tokens 100000
    """
    screen = Screen.of_the_first(as_json=as_json, quiet=quiet)
    given = {"text": text, "num_tokens": tokens, "seed": seed, "gradients": gradients or None}
    if text and task:
        raise RecipeError("--text and --task: statistics are taken from one of them. Drop one.")
    named = None if task is None else {"name": task}
    recipe = options.text_recipe({**given, "task": named}, settings)
    from smelt import processes
    from smelt.api import calibrate_by

    with processes.together(), screen.watching() as stages:
        found = calibrate_by(
            source,
            stats,
            recipe,
            device=device or "cpu",
            trust_remote_code=trust_remote_code,
            verify=verify,
            stages=stages,
        )
    least = [int(layer.count.min()) for layer in found.layers.values()]
    value = {
        "statistics": str(stats),
        "tokens": found.num_tokens,
        "layers": len(found.layers),
        "fewest_tokens_of_an_expert": least,
        "sha256": found.sha256,
        "seconds": screen.seconds,
    }
    screen.result(
        value,
        f"{found.num_tokens:,} tokens through {len(found.layers)} MoE layers in "
        f"{screen.seconds} s; the least used expert saw {min(least):,}.\n"
        f"Statistics: {stats}\n\n"
        f"Next:  smelt plan {source} --stats {stats} --keep 0.75 --keep 0.5 --keep 0.25\n"
        f"       smelt compress {source} OUT --keep 0.5 --stats {stats}",
    )


def plan(
    source: options.Source,
    stats: Annotated[str, typer.Option("--stats", help="Statistics from `smelt calibrate`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Save the plan; several plans: a folder of them."),
    ] = None,
    experts: Annotated[
        list[int] | None,
        typer.Option("--experts", help="Experts kept per layer. Repeat.", **options.COUNT),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option("--keep", help="Or the share of them. Repeat.", **options.share("--keep")),
    ] = None,
    size: Annotated[
        list[float] | None,
        typer.Option(
            "--size", help="Or the share of their bytes. Repeat.", **options.share("--size")
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="A method, as in compress. Repeat.")
    ] = None,
    form: Annotated[
        list[str] | None, typer.Option("--form", help="stock, mapped or expanded. Repeat.")
    ] = None,
    recipe: options.RecipeFile = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also each layer's output error, on the stored inputs."),
    ] = False,
    settings: options.Sets = None,
    workers: options.Workers = None,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Decide what becomes of every expert, and what that would save; nothing is written but plans.

    Several --keep, --experts, --method or --form make a table with a row for each combination.

    Example: smelt plan SRC --stats stats --keep 0.75 --keep 0.5 --method m-smoe --method reap
    """
    from smelt.cli.planning import candidates, plan_all, report

    screen = Screen(as_json=as_json, quiet=quiet)
    if output is not None:
        check_new(output, "place")
    common = {
        "source": source,
        "output": "-",  # a plan is for any destination
        "workers": workers,
        "trust_remote_code": trust_remote_code or None,
    }
    wanted = candidates(
        {"experts": experts, "keep": keep, "size": size, "method": method, "form": form},
        lambda given: options.compress_recipe(recipe, {**common, **given}, settings),
    )
    found = plan_all(source, stats, wanted, measure=measure, screen=screen)
    report(found, source=source, stats=stats, output=output, screen=screen)


def apply(
    source: options.Source,
    plan: Annotated[Path, typer.Argument(help="A plan from `smelt plan`.")],
    destination: Annotated[str, typer.Argument(help="The folder to make.")],
    stats: options.Stats = None,
    workers: options.Workers = None,
    verify: options.Verify = True,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Carry out a plan.

    Example: smelt apply SRC plan.json small --stats stats
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    from smelt import api

    with keeping(destination), screen.watching() as stages:
        folder = api.apply(
            source,
            plan,
            destination,
            stats=stats,
            workers=workers,
            trust_remote_code=trust_remote_code,
            verify=verify,
            stages=stages,
        )
    report_made(screen, source, folder, destination)
