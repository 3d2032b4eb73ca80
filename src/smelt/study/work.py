"""The process of one job: `python -m smelt.study.work train|trial|evaluate …`.

It ends with the process that started it, whose end closes its standard input.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path


def main(words: list[str]) -> int:
    """Do one job; returns the exit code: 0 done, 2 the input is at fault, 1 our mistake.

    Args:
        words: the kind of job, its file beside the run, what is evaluated (as JSON).
    """
    kind, recipe, *rest = words
    if kind == "evaluate":
        return guarded(lambda: _evaluate(Path(recipe), rest[0]))
    return guarded(lambda: _train(Path(recipe), is_trial=kind == "trial"))


def guarded(job: Callable[[], None]) -> int:
    """Do a job in a process that ends with its parent; returns the exit code, as of `main`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from smelt.errors import SmeltError

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        job()
    except SmeltError as error:
        sys.stderr.write(f"smelt: error: {error}\n")
        return 2
    except Exception:
        sys.stderr.write(traceback.format_exc())
        return 1
    return 0


def _train(path: Path, *, is_trial: bool) -> None:
    from smelt.settings import load_recipe
    from smelt.study.store import slim, write
    from smelt.train.faults import DivergedError
    from smelt.train.settings import TrainRecipe
    from smelt.train.trainer import train

    recipe = load_recipe(path, TrainRecipe)
    try:
        train(recipe)
    except DivergedError as error:
        if not is_trial:
            raise
        write(path.with_name(path.name.removesuffix("yaml") + "json"), {"diverged": str(error)})
        return
    if is_trial:
        slim(Path(recipe.output), is_trial=True)


def _evaluate(path: Path, settings: str) -> None:
    from smelt.settings import check_recipe, load_recipe
    from smelt.study.evaluate import evaluate_cell
    from smelt.study.settings import Evaluation
    from smelt.train.settings import TrainRecipe

    recipe = load_recipe(path, TrainRecipe)
    evaluate_cell(Path(recipe.output), check_recipe(json.loads(settings), Evaluation))


def _end_with_parent() -> None:
    while os.read(0, 64):  # not sys.stdin, whose lock the interpreter wants at its end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
