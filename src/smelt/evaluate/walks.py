"""What measurements add to a walk: progress."""

import contextlib
from collections.abc import Iterator

from smelt.checkpoint.walk import Stage, Visit
from smelt.compress.calibrate import Progress


class Steps:
    """Counts the blocks of one walk or several and tells of each."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0

    @contextlib.contextmanager
    def visit(self, stage: Stage) -> Iterator[None]:
        """Around a block of a walk."""
        yield
        self.done += 1
        if self.progress:
            self.progress(stage.name, self.done, self.total)

    def around(self, inner: Visit) -> Visit:
        """The same, with another visit inside."""

        @contextlib.contextmanager
        def both(stage: Stage) -> Iterator[None]:
            with self.visit(stage), inner(stage):
                yield

        return both
