"""The same numbers as lm-evaluation-harness called by hand on the same files, item for item."""

import gzip
import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.evaluate.task_files import read_task
from smelt.evaluate.tasks import TASKS, ask_outcomes

OWN = Path(lm_eval.__file__).parent / "tasks"
ARC = "arc/arc_easy.yaml"
FILES = {
    "piqa": ("piqa/piqa.yaml", None),
    "arc_easy": (ARC, None),
    "arc_challenge": (ARC, None),
    "openbookqa": ("openbookqa/openbookqa.yaml", None),
    "boolq": ("super_glue/boolq/default.yaml", None),
    "winogrande": ("winogrande/default.yaml", None),
    "cb": (
        "super_glue/cb/default.yaml",
        lambda row: row | {"label": ["entailment", "contradiction", "neutral"].index(row["label"])},
    ),
    "rte": (
        "super_glue/rte/default.yaml",
        lambda row: row | {"label": ["entailment", "not_entailment"].index(row["label"])},
    ),
    "wsc": ("super_glue/wsc/default.yaml", lambda row: row | row["target"]),
    "commonsense_qa": ("commonsense_qa/default.yaml", None),
    "lambada": ("lambada/lambada_openai.yaml", None),
}
"""Of each task: the harness's own file, and how an item of ours is spelt there."""

FIVE = ("piqa", "arc_easy", "openbookqa", "boolq", "winogrande")


@pytest.fixture(scope="module")
def embedded():
    folder = Path(__file__).parents[2] / "src" / "smelt" / "data" / "tiny-moe"
    checkpoint = Checkpoint.open(folder)
    return load_model(checkpoint).eval(), checkpoint.tokenizer


def theirs(name, rows, folder):
    """A file of the harness's own configuration, over items of ours."""
    file, spelt = FILES[name]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(spelt(r) if spelt else r) + "\n" for r in rows))
    text = (
        f"include: {OWN / file}\ntask: own_{name}\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "training_split: null\nvalidation_split: null\ntest_split: test\n"
    )
    (folder / f"{name}.yaml").write_text(text)


def compare(name, model, tokenizer, data, folder, limit, monkeypatch):
    """Ours and the harness's figures of a task, and how many items each metric agrees on."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    items = read_task(name, TASKS[name], data, limit=limit)
    with gzip.open(data / name / f"{TASKS[name].split}.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    theirs(name, [lines[int(row["number"])] for row in items.rows], folder)
    ours = {one.metric: one for one in ask_outcomes(model, tokenizer, [items])}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    its = simple_evaluate(
        harness, tasks=[f"own_{name}"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    samples = sorted(its["samples"][f"own_{name}"], key=lambda one: one["doc_id"])
    for metric, one in ours.items():
        known = {"macro F1": "f1"}.get(metric, metric)
        assert one.score().value == pytest.approx(
            its["results"][f"own_{name}"][f"{known},none"], rel=1e-6
        )
        if one.aggregate == "mean":
            assert one.columns[:, 0].tolist() == [float(sample[known]) for sample in samples]
    return ours, its["results"][f"own_{name}"]


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_figures_are_those_of_the_harness_by_hand_item_for_item(
    embedded, smelt_data, tmp_path, monkeypatch, name
):
    compare(name, *embedded, smelt_data, tmp_path, 12, monkeypatch)


@pytest.mark.data
@pytest.mark.slow
def test_three_hundred_items_of_five_tasks_agree_with_the_harness(
    embedded, smelt_data, tmp_path, monkeypatch
):
    for name in FIVE:
        ours, _ = compare(name, *embedded, smelt_data, tmp_path, 300, monkeypatch)
        assert len(ours["acc"].columns) == 300
