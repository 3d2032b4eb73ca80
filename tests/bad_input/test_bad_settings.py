"""Budgets, texts and settings that cannot be end in one clear message, and nothing is written."""

import pytest
import torch

from bad_input.spoiling import compress, refused
from commands import make_source, smelt

# --- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1.5, -0.5, 0.01])
def test_a_share_out_of_range(good, text, keep):
    refused(compress(good, text, "--keep", keep), "keep")


@pytest.mark.parametrize("experts", [0, 99, -3])
def test_a_count_out_of_range(good, text, experts):
    refused(compress(good, text, "--experts", experts), "experts")


@pytest.mark.parametrize("command", [("compress",), ("plan", "--stats", "s")])
def test_a_budget_in_percent_is_told_how_to_say_it(good, command):
    words = (*command, good, *(["out"] if command == ("compress",) else []))
    refused(smelt(*words, "--experts", "50%"), "--experts 50%", "--keep 0.5")
    for share in ("--keep", "--size"):
        for said in ("50%", "50", "nan"):
            refused(smelt(*words, share, said), f"{share} {said}", "like 0.5")


def test_two_budgets_or_none(good, text):
    refused(compress(good, text, "--experts", 4, "--keep", 0.5), "set one of experts")
    done = smelt("compress", good, good.parent / "out", "--text", text)
    refused(done, "set one of experts (a count), keep (a share) and size")


def test_a_budget_of_bytes_that_nothing_fits_is_refused_before_anything_is_calibrated(good, text):
    refused(compress(good, text, "--size", 0.001), "Allow more")
    tight = ("--form", "mapped", "--experts", 2, "--set", "budget=measured")
    refused(compress(good, text, *tight, "--set", "min_per_layer=4"), "at least")
    assert not list(good.parent.glob("*.partial"))


def test_fewer_experts_than_a_token_uses(good, text):
    refused(compress(good, text, "--experts", 1), "chooses 2 per token", "nearest", "mapped form")


def test_a_count_that_group_limited_routing_cannot_hold(tmp_path, text):
    make_source(tmp_path / "source", "deepseek_v3")
    done = compress(tmp_path / "source", text, "--experts", 5)
    refused(done, "nearest count that works is 6", "groups of experts")


def test_a_form_that_the_method_cannot_have(good, text):
    refused(compress(good, text, "--set", "budget=global"), "stock form", "mapped")
    refused(compress(good, text, "--form", "zip"), "form")


def test_an_excluded_layer_that_is_not_there(good, text):
    done = compress(good, text, "--form", "mapped", "--set", "excluded=[model.layers.9.mlp]")
    refused(done, "model.layers.9.mlp", "model.layers.0.mlp")


# --- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_text_that_is_empty(good, tmp_path, data):
    (tmp_path / "t.txt").write_bytes(data)
    refused(compress(good, tmp_path / "t.txt"), "t.txt", "text")


@pytest.mark.parametrize("data", [bytes(range(256)) * 40, b"text\0text" * 500])
def test_text_that_is_binary(good, tmp_path, data):
    (tmp_path / "t.txt").write_bytes(data)
    refused(compress(good, tmp_path / "t.txt"), "t.txt", "not text")


def test_text_that_is_not_there(good, tmp_path):
    refused(compress(good, tmp_path / "no.txt"), "no.txt", "no such text")


def test_fewer_tokens_than_useful_warn_and_go_on(good, tmp_path):
    (tmp_path / "t.txt").write_text("Only a few words are here, and no more.")
    done = compress(good, tmp_path / "t.txt")
    assert done.code == 0
    assert "600 were asked" in done.err and "their scores are noise" in done.err
    assert all(line.startswith("smelt: warning: ") for line in done.err.splitlines())


# --- settings ------------------------------------------------------------------------------------


def test_a_misspelt_setting_names_those_there_are(good, text, tmp_path):
    refused(compress(good, text, "--set", "simlarity=weights"), "simlarity", "similarity")
    done = compress(good, text, "--set", "calibration.tokens=5")
    refused(done, "calibration.tokens", "num_tokens")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("keep: 0.5\nmehtod: reap\n")
    refused(compress(good, text, "--recipe", recipe), "r.yaml", "mehtod", "method")


@pytest.mark.parametrize(("recipe", "says"), [("[1, 2]", "mapping"), ("a: [", "not valid YAML")])
def test_a_recipe_that_is_none(good, text, tmp_path, recipe, says):
    (tmp_path / "r.yaml").write_text(recipe)
    refused(compress(good, text, "--recipe", tmp_path / "r.yaml"), says)
    refused(compress(good, text, "--recipe", tmp_path / "no.yaml"), "no such recipe file")


def test_names_that_do_not_exist(good, text):
    refused(compress(good, text, "--method", "m-smo"), "m-smo", "did you mean 'm-smoe'")
    refused(compress(good, text, "--method", "no_such_module:f"), "cannot be imported")
    refused(compress(good, text, "--set", "score=loudness"), "score", "count")
    refused(compress(good, text, "--set", "similarity=nearness"), "nearness")
    refused(compress(good, text, "--set", "router=none"), "router")
    refused(compress(good, text, "--set", "weights=heavy"), "weights")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(good, text):
    refused(compress(good, text, "--device", "cuda"), "cuda", "here are: cpu")


@pytest.mark.parametrize("device", ["tpu9000", "meta", "gpu:x"])
def test_a_device_that_does_not_exist(good, text, device):
    refused(compress(good, text, "--device", device), device, "here are: cpu")


def test_a_flag_that_does_not_exist(good):
    done = smelt("compress", good, good.parent / "out", "--kep", 0.5)
    assert done.code == 2
    assert "--kep" in done.err and "Traceback" not in done.err
