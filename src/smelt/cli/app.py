"""The commands and their order."""

import typer

from smelt.cli.analysing import analyse
from smelt.cli.benching import bench
from smelt.cli.compressing import apply, calibrate, compress, plan
from smelt.cli.demo import demo
from smelt.cli.exporting import export
from smelt.cli.healing import heal
from smelt.cli.inspecting import inspect
from smelt.cli.measuring import evaluate
from smelt.cli.pairing import compare
from smelt.cli.pushing import push
from smelt.cli.reporting import report
from smelt.cli.studying import study
from smelt.cli.training import train

app = typer.Typer(
    name="smelt",
    help="Make mixture-of-experts checkpoints small: merge or drop experts, and measure the cost.",
    epilog="Start with: smelt demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unforeseen error is ours: its traceback stays as it is
    rich_markup_mode="rich",
)
for command in (
    demo,
    inspect,
    compress,
    evaluate,
    compare,
    calibrate,
    plan,
    apply,
    heal,
    train,
    analyse,
    export,
    push,
    study,
    bench,
    report,
):
    app.command()(command)
