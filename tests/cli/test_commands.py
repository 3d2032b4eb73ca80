"""Laws of the commands: what they print and where, and that each does what its parts would do."""

import inspect as introspection
import json
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from commands import QUICK, contents, smelt
from smelt import api
from smelt.cli import screen
from smelt.compress.plan import Plan
from smelt.recipe import CompressRecipe, nest
from smelt.settings import check_recipe, load_recipe

PART = ("--set", "sequence_length=32")


# --- compress and its steps ----------------------------------------------------------------------


def test_compress_is_calibrate_plan_apply(source, stats, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--keep", 0.5, "--text", text, "--set", "calibration.sequence_length=32")
    words = (*words, "--no-reconstruct")
    whole = smelt("compress", source, "whole", *words, "--tokens", 1200, "--json")
    assert whole.code == 0, whole.err
    assert smelt("compress", source, "given", *words, "--stats", stats).code == 0
    assert smelt("plan", source, "--stats", stats, "--keep", 0.5, "-o", "p.json").code == 0
    assert smelt("apply", source, "p.json", "parts", "--stats", stats).code == 0
    files = [
        {n: h for n, h in contents(tmp_path / name).items() if n.endswith("safetensors")}
        for name in ("whole", "given", "parts")
    ]
    assert files[0] and files[0] == files[1] == files[2]


def test_what_compress_says_is_what_is_on_disk(source, text, tmp_path):
    done = smelt(
        "compress", source, tmp_path / "o", "--experts", 5, "--text", text, *QUICK, "--json"
    )
    said = done.json
    shards = sorted((tmp_path / "o").glob("*.safetensors"))
    tensors = [tensor for file in shards for tensor in load_file(file).values()]
    assert said["experts_after"] == [5, 5]
    assert said["bytes_after"] == sum(t.numel() * t.element_size() for t in tensors)
    assert said["params_after"] == sum(t.numel() for t in tensors)
    assert said["bytes_on_disk"] == sum(file.stat().st_size for file in shards)


def test_options_win_over_the_recipe_and_set_wins_over_options(source, stats, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {source}\noutput: unused\nkeep: 0.25\nmethod: reap\nseed: 1\n")
    out = tmp_path / "o"
    words = ("--recipe", recipe, "--experts", 6, "--seed", 2, "--set", "seed=3", "--stats", stats)
    done = smelt("compress", source, out, *words)
    assert done.code == 0, done.err
    made = Plan.load(out / "smelt" / "plan.json").recipe
    assert (made.method, made.experts, made.keep, made.seed) == ("reap", 6, None, 3)
    assert made.calibration.seed == 2


def test_a_recipe_alone_says_everything(source, stats, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {source}\noutput: {tmp_path / 'o'}\nkeep: 0.5\n")
    assert smelt("compress", "--recipe", recipe, "--stats", stats).code == 0
    assert (tmp_path / "o" / "config.json").is_file()


def test_several_texts_are_mixed(source, text, tmp_path):
    words = ("--text", f"{text}=0.25", "--text", "python:code", "--tokens", 400, *PART)
    done = smelt("calibrate", source, tmp_path / "s", *words)
    assert done.code == 0, done.err
    details = json.loads((tmp_path / "s" / "stats.json").read_text())["details"]
    assert details["text"] == [f"{text}=0.25", "python:code"]


def test_plans_of_several_budgets_and_methods_are_one_table(source, stats, tmp_path):
    words = ("--keep", 0.75, "--keep", 0.5, "--method", "m-smoe", "--method", "reap")
    done = smelt("plan", source, "--stats", stats, *words, "-o", tmp_path / "plans", "--json")
    plans = done.json["plans"]
    assert [(p["method"], p["asked"]) for p in plans] == [
        ("m-smoe", 0.75), ("m-smoe", 0.5), ("reap", 0.75), ("reap", 0.5)
    ]  # fmt: skip
    assert plans[1]["predicted"]["bytes_after"] < plans[0]["predicted"]["bytes_after"]
    for plan in plans:
        assert Plan.load(plan["file"]).predicted.model_dump() == plan["predicted"]


def test_a_share_of_bytes_is_a_plan_beside_a_share_of_experts(source, stats, tmp_path):
    words = ("--stats", stats, "--keep", 0.75, "--size", 0.75, "--json")
    plans = smelt("plan", source, *words, "-o", tmp_path / "p").json["plans"]
    assert [plan["asked"] for plan in plans] == [0.75, 0.75]
    assert len({plan["file"] for plan in plans}) == 2
    by_size = Plan.load(plans[1]["file"]).recipe
    assert by_size.size == 0.75 and by_size.experts is not None and by_size.keep is None


def test_a_plan_that_cannot_be_is_a_row_beside_those_that_can(source, stats):
    words = ("--keep", 0.5, "--method", "reap", "--method", "fisher", "--form", "stock")
    done = smelt("plan", source, "--stats", stats, *words)
    assert done.code == 0
    assert "fisher-stock-0.5: cannot be. rule fisher needs gradients" in done.out
    none = smelt("plan", source, "--stats", stats, "--keep", 0.01, "--keep", 0.02)
    assert none.code == 2 and "None of these plans can be" in none.err


def test_a_plan_measures_its_error_per_layer(source, stats):
    words = ("--keep", 0.75, "--keep", 0.25, "--form", "mapped", "--measure", "--json")
    plans = smelt("plan", source, "--stats", stats, *words).json["plans"]
    assert 0 < plans[0]["mean error"] < plans[1]["mean error"]
    assert [row["layer"] for row in plans[0]["layers"]] == [
        "model.layers.0.mlp", "model.layers.1.mlp"
    ]  # fmt: skip


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_counts_every_byte_once(source):
    about = smelt("inspect", source, "--json").json
    tensors = load_file(source / "model.safetensors")
    assert about["num_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert about["num_params"] == sum(t.numel() for t in tensors.values())
    experts = [t for name, t in tensors.items() if ".experts." in name]
    assert about["bytes_by_part"]["experts"] == sum(t.numel() * t.element_size() for t in experts)
    idle = sum(t.numel() for t in experts) * (8 - 2) // 8
    assert about["num_active_params"] == about["num_params"] - idle


def test_inspect_reads_no_weights(source, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("smelt.checkpoint.shards.read_into", fail)
    monkeypatch.setattr("smelt.checkpoint.quantised.read_into", fail)
    assert smelt("inspect", source).code == 0


def test_what_inspect_promises_is_what_compress_makes(source, stats, tmp_path):
    promised = smelt("inspect", source, "--json").json["outlook"]
    for one in promised:
        out = tmp_path / f"{one['experts']}"
        done = smelt(
            "compress", source, out, "--experts", one["experts"], "--stats", stats, "--json"
        )
        assert done.json["bytes_after"] == one["bytes_after"]


def test_inspect_names_the_counts_that_a_group_limited_router_can_hold(tmp_path):
    from commands import make_source

    about = smelt("inspect", make_source(tmp_path / "d", "deepseek_v3"), "--json").json
    assert about["legal_experts"] == [4, 6, 8]
    assert about["num_dense_blocks"] == 1
    assert about["router"] == "sigmoid"
    assert about["bytes_by_part"]["shared experts"] > 0


def test_inspect_of_a_result_says_what_was_done(source, stats, tmp_path):
    out = tmp_path / "o"
    smelt("compress", source, out, "--keep", 0.5, "--form", "mapped", "--stats", stats)
    done = smelt("inspect", out, "--verify", "--json")
    about = done.json
    assert about["made"]["form"] == "mapped"
    assert about["made"]["experts_before"] == [8, 8]
    assert about["num_stored"] == about["made"]["experts_after"]
    assert about["verified_files"] == about["num_files"] == about["num_checksums"]
    assert "Made by smelt from" in smelt("inspect", out).out


# --- evaluate ------------------------------------------------------------------------------------


def test_evaluate_finds_no_difference_between_a_checkpoint_and_itself(source, text, tmp_path):
    twin = shutil.copytree(source, tmp_path / "twin")
    words = ("--original", source, "--text", text, "--tokens", 300, *PART)
    done = smelt("evaluate", source, twin, *words, "--json", "-o", tmp_path / "r.json")
    first, second = done.json["checkpoints"]
    assert second["nats more than the first"] == 0
    assert second["KL"] == pytest.approx(0, abs=1e-9)
    assert second["routing agreement"] == 1 and second["worst layer error"] == 0
    assert first["bits per byte"] == second["bits per byte"]
    saved = json.loads((tmp_path / "r.json").read_text())["results"]
    assert {"nats per token", "bits per byte", "logit KL"} <= {one["metric"] for one in saved}


def test_folders_of_one_name_are_told_apart(source, text, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(source, tmp_path / name / "x")
    paths = [str(tmp_path / name / "x") for name in ("a", "b")]
    words = ("--text", text, "--tokens", 100, *PART, "--json")
    rows = smelt("evaluate", *paths, *words).json["checkpoints"]
    assert [row["checkpoint"] for row in rows] == paths


# --- how commands speak --------------------------------------------------------------------------


def test_json_is_all_of_stdout_and_quiet_is_silent(source, stats, tmp_path):
    words = ("--keep", 0.5, "--stats", stats)
    done = smelt("compress", source, tmp_path / "a", *words, "--json", "--quiet")
    assert json.loads(done.out)["output"] == str(tmp_path / "a") and not done.err
    done = smelt("compress", source, tmp_path / "b", *words, "--quiet")
    assert done.code == 0 and not done.out and not done.err


def test_numbers_that_json_cannot_hold_become_null(capsys):
    screen.Screen(as_json=True).result({"a": float("inf"), "b": [float("nan"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5]}


def test_an_unforeseen_error_keeps_its_traceback(source, monkeypatch):
    def fail(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr("smelt.checkpoint.describe.describe", fail)
    with pytest.raises(KeyError, match="ours"):
        smelt("inspect", source)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_says_what_needs_less(source, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("smelt.checkpoint.describe.describe", fail)
    done = smelt("inspect", source)
    assert done.code == 2
    assert "out of memory" in done.err and "calibration.batch_size" in done.err


def test_durations_and_sizes_read_well():
    assert [screen.clock(s) for s in (0.4, 99.4, 100, 7500)] == [
        "0 s",
        "99 s",
        "1:40 min",
        "2:05 h",
    ]
    assert [screen.size(n) for n in (12, 1234, 10**9, 123456789)] == [
        "12 B", "1.23 kB", "1 GB", "123 MB"
    ]  # fmt: skip
    assert screen.counts([4, 4]) == "4"
    assert screen.counts([3, 5]) == "3 to 5 (4.0 on average)"


def test_python_m_smelt_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "smelt", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "compress" in done.stdout


# --- demo and Python -----------------------------------------------------------------------------


def test_the_demo_measures_what_it_compressed(source, tmp_path):
    out = tmp_path / "demo"
    done = smelt("demo", "--source", source, "--tokens", 600, "--output", out, "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert [row["experts"] for row in rows] == [8, 6, 4, 2, 4, 4]
    assert rows[0]["MB"] > rows[1]["MB"] > rows[2]["MB"] > rows[3]["MB"]
    assert all(row["KL code"] > 0 and row["ppl prose"] > 1 for row in rows[1:])
    assert sorted(path.name for path in out.iterdir()) == [
        "mapped-50-percent", "repaired-50-percent",
        "stock-25-percent", "stock-50-percent", "stock-75-percent",
    ]  # fmt: skip
    fits = [layer.fit for layer in Plan.load(out / "repaired-50-percent/smelt/plan.json").layers]
    assert all(fit and fit.after < fit.before for fit in fits)


def test_settings_by_plain_names_find_their_group():
    assert nest({"keep": 0.5, "num_tokens": 9, "seed": 4}) == {
        "keep": 0.5, "seed": 4, "calibration": {"num_tokens": 9, "seed": 4}
    }  # fmt: skip


def test_a_recipe_from_python_is_that_of_its_file(tmp_path):
    (tmp_path / "r.yaml").write_text("source: a\noutput: b\nkeep: 0.5\ncalibration: {seed: 2}\n")
    values = {"source": "a", "output": "b", "keep": 0.5, "calibration": {"seed": 2}}
    assert load_recipe(tmp_path / "r.yaml", CompressRecipe) == check_recipe(values, CompressRecipe)


FUNCTIONS = (api.inspect, api.calibrate, api.plan, api.apply, api.evaluate, api.compress)


def test_the_examples_of_the_python_functions_run_in_their_order(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"source": str(source), "print": lambda *_: None}
    for function in FUNCTIONS:
        doc = introspection.getdoc(function)
        found = re.findall(r"^    .*(?:\n(?:    .*)?)*", doc.split("\nArgs:")[0], re.MULTILINE)
        assert len(found) == 1, f"{function.__name__} has {len(found)} examples"
        with screen.plain_warnings():
            exec(textwrap.dedent(found[0]), names)
    assert {"stats", "plan.json", "half", "small"} <= {path.name for path in tmp_path.iterdir()}
