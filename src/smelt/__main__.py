"""`python -m smelt`: the command line."""

import sys

from smelt.cli import main

sys.exit(main())
