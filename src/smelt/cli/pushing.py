"""The command that uploads a checkpoint."""

from typing import Annotated

import typer

from smelt.cli import options
from smelt.cli.screen import Screen


def push(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, or a GGUF file.")],
    repository: Annotated[str, typer.Argument(help="user/name on the Hugging Face hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository, if there is none, private.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", help="Of the commit.", show_default=False)
    ] = None,
    verify: options.Verify = True,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub, every file of it, in one commit.

    The token is that of `hf auth login`, or of the variable HF_TOKEN.

    Example: smelt push small me/small
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    from smelt.export.hub import push as run

    address = run(source, repository, private=private, message=message, verify=verify)
    screen.result(
        {"source": source, "repository": repository, "address": address, "seconds": screen.seconds},
        f"{source} is at {address}",
    )
