"""Laws of training in several processes: it is the training of one, in parts."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smelt import processes
from smelt.errors import RecipeError, SmeltError
from smelt.settings import check_recipe
from smelt.train import distributed
from smelt.train.trainer import TrainRecipe, train

SCRIPT = Path(__file__).with_name("two_processes.py")
STEPS, STOP = 10, 6
EXACT = {"rel": 2e-6}  # sums of two halves round otherwise than one
WORDS = "one two three four five six seven eight nine ten".split()

LOW = {
    "precision": "bfloat16",
    "accumulate": 2,
    "gradient_checkpointing": True,
    "steps": 4,
    "model": {
        "model_type": "samoe",
        "preset": "modern",
        "sharing": "bottom",  # two layers share a pool, two have their own
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_experts": 4,
    },
}
"""bfloat16, micro-batches, recomputed activations, shared and own experts, SwiGLU, top-2."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recipes; 301 tokens, 5 experts and 3 entries do not halve."""
    folder = tmp_path_factory.mktemp("distributed")
    for split, numbers in (("train", range(400)), ("held_out", range(400, 440))):
        lines = (" ".join(WORDS[(n + i) % 10] for i in range(7 + n % 5)) + ".\n" for n in numbers)
        (folder / f"{split}.txt").write_text("".join(lines))
    recipe = {
        "model": {
            "model_type": "samoe",
            "preset": "paper",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_experts": 5,
            "pool_size": 3,
            "max_position_embeddings": 32,
        },
        "tokenizer": {"vocab_size": 301},
        "text": {
            "train": [str(folder / "train.txt")],
            "held_out": [str(folder / "held_out.txt")],
            "tokens": 4000,
            "held_out_tokens": 300,
            "sequence_length": 32,
            "cache": str(folder / "cache"),
        },
        "output": str(folder / "one"),
        "steps": STEPS,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "log_every": 2,
        "details_every": 5,
        "evaluate_every": 5,
        "checkpoint_every": 4,
        "keep_checkpoints": 1,
        "dtype": "float32",
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "low.json").write_text(json.dumps(LOW))
    return folder


def run(folder, name, **changes):
    """The losses of a run in this process, and its result."""
    told = []
    values = json.loads((folder / "recipe.json").read_text())
    recipe = check_recipe({**values, **changes, "output": str(folder / name)}, TrainRecipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(recipe, on_step=lambda step, steps, nats: told.append(nats))
    return told, result


@pytest.fixture(scope="module")
def alone(folder):
    """The run in one process."""
    return run(folder, "one")


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(
        [*command, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )


@pytest.fixture(scope="module")
def together(folder, alone):
    """What two processes did, each one's report, and how their torchrun ended."""
    ended = torchrun(SCRIPT, folder)
    path = folder / "done.json"
    assert path.exists(), ended.stderr[-4000:]
    return {"reports": json.loads(path.read_text()), "ended": ended}


def weights(folder, name):
    return load_file(folder / name / "model.safetensors")


def log(folder, name):
    text = (folder / name / "smelt" / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# --- the same training ---------------------------------------------------------------------------


def test_two_processes_have_the_losses_of_one(folder, alone, together):
    for report in together["reports"]:
        assert report["whole run"] == pytest.approx(alone[0], **EXACT)
    assert len(alone[0]) == STEPS
    # tokens, balance, norm of the gradient, held-out loss, what was dropped, alpha and beta
    exact = {"step", "tokens", "learning_rate"}
    close = {"nats", "balance", "gradient_norm", "dropped", "load_balance", "beta"}
    lines = list(zip(log(folder, "one"), log(folder, "whole"), strict=True))
    assert {"dropped", "beta"} < lines[-1][0].keys()
    for one, two in lines:
        assert one.keys() == two.keys()
        assert {key: one[key] for key in exact & one.keys()} == {
            key: two[key] for key in exact & two.keys()
        }
        for key in close & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), key
        for name, nats in one.get("held_out", {}).items():
            assert two["held_out"][name] == pytest.approx(nats, **EXACT)


def test_two_processes_end_with_the_weights_of_one(folder, alone, together):
    one, two = weights(folder, "one"), weights(folder, "whole")
    assert {name: tensor.shape for name, tensor in one.items()} == {
        name: tensor.shape for name, tensor in two.items()
    }
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    result = json.loads((folder / "whole" / "smelt" / "training.json").read_text())
    for key in ("parameters", "tokens_trained", "expert_counts"):
        assert result[key] == alone[1][key]
    for name, found in result["held_out"].items():
        assert found["nats_per_token"] == pytest.approx(
            alone[1]["held_out"][name]["nats_per_token"], **EXACT
        )
        assert found["predicted_tokens"] == alone[1]["held_out"][name]["predicted_tokens"]
    assert (folder / "whole" / "config.json").read_text() == (
        folder / "one" / "config.json"
    ).read_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "whole")
    assert type(model).__name__ == "SaMoEForCausalLM"


def test_low_precision_micro_batches_and_recomputation_change_nothing_either(folder, together):
    expected, _ = run(folder, "low-alone", **LOW)
    told = together["reports"][0]["low"]
    assert told == pytest.approx(expected, rel=2e-3)  # bfloat16 has three digits
    assert told[:2] == pytest.approx(expected[:2], rel=1e-4)


# --- going on ------------------------------------------------------------------------------------


def test_two_processes_go_on_where_they_stopped(folder, together):
    report = together["reports"][0]
    assert report["before the stop"] == report["whole run"][:STOP]
    assert report["after the stop"] == report["whole run"][4:]
    whole, resumed = weights(folder, "whole"), weights(folder, "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    kept = [line["nats"] for line in log(folder, "resumed") if "nats" in line]
    assert kept == [line["nats"] for line in log(folder, "whole") if "nats" in line]


def test_one_process_goes_on_where_two_stopped(folder, alone, together):
    told, _ = run(folder, "left")
    assert told == pytest.approx(alone[0][4:], **EXACT)
    one, left = weights(folder, "one"), weights(folder, "left")
    assert max(float((one[name] - left[name]).abs().max()) for name in one) < 1e-4


# --- what is divided -----------------------------------------------------------------------------


def test_a_model_divided_and_put_together_is_the_same_bit_for_bit(together):
    assert all(report["copied"] for report in together["reports"])


def test_the_pool_is_gathered_and_reduced_once_a_step_whatever_the_depth(together):
    few, many = together["reports"][0]["steps"]
    for layers, step in ((4, few), (8, many)):
        # the root once, a block twice: for its forward and for its backward
        assert len(step["gathered"]) == 1 + 2 * layers
        assert len(step["reduced"]) == 1 + layers
        assert sum(size >= step["pool"] for size in step["gathered"]) == 1
        assert sum(size >= step["pool"] for size in step["reduced"]) == 1
        # what the formula of docs/scaling-out.md counts, and padding to equal parts
        assert sum(step["gathered"]) == pytest.approx(step["predicted"][0], rel=0.03)
        assert sum(step["reduced"]) == pytest.approx(step["predicted"][1], rel=0.03)
    assert few["pool"] == many["pool"]


def test_a_step_in_low_precision_sends_what_the_formula_says(together):
    (shared, formula), (own, formula_own) = together["reports"][0]["low steps"]
    assert shared == pytest.approx(formula, rel=0.03)
    assert own == pytest.approx(formula_own, rel=0.03)


def test_each_process_holds_its_half_of_the_pool_its_gradient_and_its_adam(together):
    for report in together["reports"]:
        for step in report["steps"]:
            assert step["held"] == dict.fromkeys(("weights", "gradients", "adam"), step["pool"] / 2)


# --- when something is wrong ---------------------------------------------------------------------


def test_when_one_process_fails_all_end_and_one_speaks(together):
    ended = together["ended"]
    assert ended.returncode != 0
    assert ended.stderr.count("smelt: error:") == 1, ended.stderr[-4000:]
    assert "smelt: error: the second process has had enough" in ended.stderr
    assert "exitcode  : 2" in ended.stderr
    assert "most recent call last" not in ended.stderr.split("torch/distributed/elastic")[0]


def test_what_is_wrong_in_all_processes_is_said_by_the_first_to_fail(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    monkeypatch.setattr(processes.atexit, "register", lambda tell, *what: tell(*what))
    monkeypatch.setattr(processes._Met, "store", dist.HashStore())
    error = RecipeError("steps = 0 cannot be")
    processes._end(error)  # in the first: its own error goes on
    with pytest.raises(SystemExit) as left:  # in the second
        processes._end(error)
    assert left.value.code == 2


def test_a_process_that_lost_another_says_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    monkeypatch.setattr(processes.atexit, "register", lambda *_: None)
    monkeypatch.setattr(processes._Met, "store", dist.HashStore())
    with pytest.raises(SmeltError, match="has lost another one of this run"):
        processes._end(RuntimeError("[...] Connection closed by peer [127.0.0.1]:4711"))


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    distributed.check_batch(12, 2)
    with pytest.raises(RecipeError, match="multiple of 6"):
        distributed.check_batch(8, 2)
