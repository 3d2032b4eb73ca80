"""The command line: `smelt demo | inspect | compress | evaluate | calibrate | plan | apply | …`."""

from smelt.cli.app import app
from smelt.cli.run import main

__all__ = ["app", "main"]
