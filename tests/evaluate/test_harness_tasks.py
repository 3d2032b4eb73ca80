"""lm-evaluation-harness's own tasks: run as they are, by their own names, from local data."""

import json
from pathlib import Path

import numpy as np
import pytest

from commands import make_source
from commands import smelt as run_smelt
from smelt.errors import RecipeError, SmeltError
from smelt.evaluate import tasks
from smelt.evaluate.tasks import evaluate_tasks, read_items

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metadata:
  version: 3.0
"""
CHOICE = """doc_to_choice: ["no", "yes"]
metric_list:
  - metric: acc
  - metric: mcc
"""
ROWS = [{"question": f"Is it {i * i}?", "answer": i % 3 % 2} for i in range(9)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    home = tmp_path / "own"
    home.mkdir()

    def write(name, kind="multiple_choice", more=CHOICE, file=data):
        (home / f"{name}.yaml").write_text(YAML.format(name=name, file=file, kind=kind, more=more))

    write("so")
    write("copa")  # a name of ours too
    write("gone", file=tmp_path / "gone.jsonl")
    return home


def test_a_task_of_a_folder_is_scored_as_the_harness_scores_it(folder, llama, words):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = {one.metric: one for one in evaluate_tasks(llama, words, ["so"], task_folder=folder)}
    harness = tasks.load_harness()
    with harness.quiet():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        scorer = harness.Scorer(llama, words, 4)
        its = simple_evaluate(scorer, tasks=["so"], task_manager=manager, bootstrap_iters=0)
    for metric, one in own.items():
        assert one.value == pytest.approx(its["results"]["so"][f"{metric},none"])
    assert own["acc"].chance == 0.5 and own["acc"].n == 9
    assert own["acc"].standard_error == pytest.approx(its["results"]["so"]["acc_stderr,none"]) or (
        its["results"]["so"]["acc_stderr,none"] == "N/A"
    )
    assert own["acc"].source == "lm-evaluation-harness's so"
    assert own["acc"].harness["task_version"] == "3.0"


def test_a_limit_is_spread_evenly_over_a_harness_task_too(folder, llama, words, heard):
    (acc, _) = evaluate_tasks(llama, words, ["so"], task_folder=folder, limit=5)
    assert acc.n == 5 and "subset: 5 of 9 items" in acc.source
    assert list(dict.fromkeys(question for question, *_ in heard)) == [
        ROWS[i]["question"] for i in (0, 1, 3, 5, 7)
    ]


def test_ours_wins_over_a_name_of_the_harness_and_the_prefix_over_ours(folder, write):
    item = {"premise": "It", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}
    write("copa", [item])
    ours, theirs = read_items(["copa", "lm_eval:copa"], task_folder=folder)
    assert str(ours) == "copa/validation (subset: 1 of 100 items)"
    assert str(theirs) == "lm-evaluation-harness's copa"


def test_generated_answers_and_whole_texts_of_harness_tasks_are_scored(folder, llama, words):
    data = folder.parent / "rows.jsonl"
    for kind, more in (
        ("generate_until", 'generation_kwargs:\n  until: ["x"]\n  max_gen_toks: 4'),
        ("loglikelihood_rolling", ""),
    ):
        text = YAML.format(name=kind, file=data, kind=kind, more=more)
        (folder / f"{kind}.yaml").write_text(text)
    found = evaluate_tasks(
        llama, words, ["generate_until", "loglikelihood_rolling"], task_folder=folder, limit=4
    )
    metrics = {one.metric for one in found}
    assert metrics == {"exact_match", "word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert all(np.isfinite(one.value) and one.n == 4 for one in found)


def test_data_that_cannot_be_had_is_one_message(folder):
    with pytest.raises(SmeltError, match="task gone cannot be loaded here: .*--task-folder"):
        read_items(["gone"], task_folder=folder)


def test_a_folder_of_tasks_that_is_wrong_is_named(folder, tmp_path):
    with pytest.raises(RecipeError, match="no such folder of tasks"):
        read_items(["so"], task_folder=tmp_path / "none")
    with pytest.raises(RecipeError, match="there is no task 'lm_eval:hans-hans'"):
        read_items(["lm_eval:hans-hans"], task_folder=folder)
    (folder / "bad.yaml").write_text("task: [so\n  x: {")
    with pytest.raises((RecipeError, SmeltError)):
        read_items(["bad"], task_folder=folder)


@pytest.mark.slow
def test_the_command_runs_a_harness_task_and_refuses_what_needs_the_network(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    source = make_source(tmp_path / "x")
    said = run_smelt("evaluate", source, "--tasks", "so", "--task-folder", folder, "--json")
    assert said.code == 0, said.err
    assert said.json["results"][0]["task"] == "so"
    said = run_smelt("evaluate", source, "--tasks", "lm_eval:arc_easy")
    assert said.code == 2 and said.err.count("\n") == 1
    assert "arc_easy cannot be loaded here" in said.err
    assert Path(source).is_dir()
