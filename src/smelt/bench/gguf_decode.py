"""Milliseconds per decode step of GGUF files in llama.cpp, the files in turns."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median

import numpy as np

from smelt.bench.records import CheckpointCost, DecodeStep
from smelt.errors import RecipeError
from smelt.export.engine import Engine
from smelt.export.gguf_file import GgufFile

Progress = Callable[[str, int, int], None]


def measure(
    files: Sequence[GgufFile],
    *,
    contexts: Sequence[int] = (0, 512),
    turns: int = 5,
    steps: int = 3,
    threads: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[CheckpointCost], list[DecodeStep]]:
    """One sequence at a time: what a step takes after so many tokens, in every file.

    All files are loaded together and take turns, so that what else the machine does falls on all
    alike. In a turn each makes a step that is not timed, then some that are, on other tokens every
    time; the context grows by these steps. Keys and values are in float32.

    Raises:
        RecipeError: a context beyond a file's positions.
        EngineError: no llama.cpp here, or it does not take a file.
    """
    extra = turns * (steps + 1)
    for file in files:
        if max(contexts) + extra > file.context_length:
            raise RecipeError(
                f"{file.path.name}: {max(contexts)} tokens and {extra} steps are more than its "
                f"{file.context_length} positions. Give a shorter context."
            )
    generator = np.random.default_rng(seed)
    checkpoints: list[CheckpointCost] = []
    decode: list[DecodeStep] = []
    for context in contexts:
        with ExitStack() as stack:
            cells = []
            for file in files:
                begun = time.perf_counter()
                engine = stack.enter_context(
                    Engine(file.path, context=context + extra, threads=threads)
                )
                loaded = time.perf_counter() - begun
                cells.append(_Cell(file, engine, context, loaded, generator))
            for turn in range(turns):
                for cell in cells:
                    cell.turn(steps)
                if progress:
                    progress(f"context {context}", turn + 1, turns)
            decode += [cell.record(steps, threads) for cell in cells]
            if context == contexts[0]:
                checkpoints = [cell.about() for cell in cells]
    return checkpoints, decode


class _Cell:
    """One file after one context."""

    def __init__(
        self,
        file: GgufFile,
        engine: Engine,
        context: int,
        loaded: float,
        generator: np.random.Generator,
    ) -> None:
        self.file, self.engine, self.context, self.loaded = file, engine, context, loaded
        self.generator, self.place, self.seconds = generator, context, list[float]()
        self.processor = list[float]()
        if context:
            engine.logits(self._draw(context))

    def _draw(self, count: int) -> list[int]:
        found: list[int] = self.generator.integers(self.engine.num_vocabulary, size=count).tolist()
        return found

    def _step(self) -> None:
        self.engine.logits(self._draw(1), start=self.place)
        self.place += 1

    def turn(self, steps: int) -> None:
        """A step that is not timed, then those that are."""
        self._step()
        begun, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._step()
        self.seconds.append((time.perf_counter() - begun) / steps)
        self.processor.append((time.process_time() - used) / steps)

    def record(self, steps: int, threads: int) -> DecodeStep:
        """What its turns took."""
        return DecodeStep(
            checkpoint=self.file.path.name,
            fingerprint=self.file.fingerprint,
            batch=1,
            context=self.context,
            dtype=self.file.dtype,
            device="cpu",
            threads=threads,
            turns=len(self.seconds),
            steps=steps,
            ms=1e3 * min(self.seconds),
            ms_median=1e3 * median(self.seconds),
            ms_turns=tuple(1e3 * one for one in self.seconds),
            processor_ms=1e3 * min(self.processor),
        )

    def about(self) -> CheckpointCost:
        """The file itself."""
        return CheckpointCost(
            checkpoint=self.file.path.name,
            fingerprint=self.file.fingerprint,
            folder_bytes=self.file.num_bytes,
            dtype=self.file.dtype,
            parameters=self.file.num_params,
            load_seconds=self.loaded,
        )
