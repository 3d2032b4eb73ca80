"""Train a model, or many; heal a compressed one; freeze a SaMoE model into a stock checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smelt.compress.pipeline import Stages, silent
from smelt.settings import check_recipe, find_recipe, load_recipe, read_values

if TYPE_CHECKING:
    from smelt.export.gguf_file import Progress, Written
    from smelt.samoe.convert import Exported


def train(recipe: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train the model of a recipe file; what it reached (docs/samoe.md).

    Args:
        recipe: a YAML file, or the name of a recipe that comes along, such as samoe-tiny.
        overrides: `name=value` or `group.name=value`, as of `--set`.
    """
    from smelt.train.settings import TrainRecipe
    from smelt.train.trainer import train as run

    return run(load_recipe(find_recipe(recipe, "train"), TrainRecipe, overrides))


def study(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    only: str | None = None,
    jobs: int = 2,
    threads: int = 1,
    records: str | Path | None = None,
) -> dict[str, Any]:
    """Run what is not done of a study (docs/study.md, docs/comparison.md); its tables.

    Args:
        recipe: a YAML file, or the name of a recipe that comes along: samoe, mc-smoe, tiny.
        overrides: `name=value` or `group.name=value`, as of `--set`.
        only: a part.
        jobs: processes at a time.
        threads: of each process.
        records: a file of the figures of finished runs, read before and added to.

    Returns:
        `tables.json` of the study, and `failed`: runs that did not succeed, and why.
    """
    from smelt.comparison.runner import run_comparison
    from smelt.comparison.settings import ComparisonRecipe
    from smelt.comparison.tables import results as compared
    from smelt.study.records import Records
    from smelt.study.runner import run_study
    from smelt.study.settings import StudyRecipe
    from smelt.study.tables import results

    path = find_recipe(recipe, "study")
    kept = None if records is None else Records(Path(records))
    how: dict[str, Any] = {"only": only, "jobs": jobs, "threads": threads, "records": kept}
    kind = read_values(path, StudyRecipe).get("kind")
    if kind == "operators":
        from smelt.operators.runner import run_operators
        from smelt.operators.settings import OperatorsRecipe
        from smelt.operators.tables import results as of_operators

        operators = load_recipe(path, OperatorsRecipe, overrides)
        failed = run_operators(operators, **how).failed
        return {"rows": of_operators(operators, only), "failed": failed}
    if kind is not None:
        comparison = load_recipe(path, ComparisonRecipe, overrides)
        ran = run_comparison(comparison, **how)
        return {**compared(comparison, only), "failed": ran.failed}
    training = load_recipe(path, StudyRecipe, overrides)
    ran = run_study(training, **how)
    return {**results(training, only), "failed": ran.failed}


def heal(
    student: str | Path,
    destination: str | Path,
    *,
    teacher: str | Path,
    stages: Stages = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Train a compressed checkpoint towards its original; what it was and is on held-out text.

    Args:
        settings: those of `HealRecipe` (docs/healing.md): steps, learning_rate, text={…}, …
    """
    from smelt.train.heal import HealRecipe
    from smelt.train.heal import heal as run

    names = {"student": str(student), "teacher": str(teacher), "output": str(destination)}
    recipe = check_recipe({**settings, **names}, HealRecipe)
    return run(recipe, stages=stages)


def export(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "qwen3_moe",
    dtype: str | None = None,
    verify: bool = True,
) -> "Exported":
    """Write a SaMoE model as an ordinary checkpoint of a stock family (docs/export.md)."""
    from smelt.samoe.convert import export as run

    return run(str(source), str(destination), to=to, dtype=dtype, verify=verify)


def export_gguf(
    source: str | Path,
    destination: str | Path,
    *,
    quantise: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    progress: "Progress | None" = None,
) -> "Written":
    """Write a stock checkpoint as a GGUF file for llama.cpp (docs/export.md).

    Args:
        quantise: Q8_0, Q6_K, Q5_K, Q4_K, Q3_K or Q2_K; None: the type of the weights, or `dtype`.
        verify: hold the source's files against their checksums first, where they are known.
    """
    from smelt.checkpoint.source import Checkpoint
    from smelt.checkpoint.verify import verify as verify_files
    from smelt.export.engine import check_writer

    check_writer()
    from smelt.export.gguf_file import export_gguf as run

    checkpoint = Checkpoint.open(source, trust_remote_code=trust_remote_code)
    if verify:
        verify_files(checkpoint.folder)
    return run(checkpoint, destination, quantise=quantise, dtype=dtype, progress=progress)
