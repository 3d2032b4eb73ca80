"""`smelt heal`: from options, from a recipe, and what it says to those who forget something."""

import json

import pytest
import yaml

from commands import smelt
from smelt import api

SMALL = (
    "--set text.sequence_length=16 --set text.held_out_tokens=200 --set log_every=1 "
    "--tokens 1500 --steps 2 --batch-size 4"
).split()


@pytest.fixture(scope="module")
def small(ground):
    stats = ground / "stats"
    settings = {"stats": stats, "experts": 4, "form": "mapped", "reconstruct": False}
    return api.compress(ground / "source", ground / "small", **settings)


@pytest.fixture
def words(small, source, text, tmp_path, monkeypatch):
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    return (small, "--teacher", source, "--text", text, "--held-out", text, *SMALL)


@pytest.mark.filterwarnings("ignore:.*tokens found where.*")
def test_options_and_a_recipe_say_the_same_and_options_win(words, source, small, text, tmp_path):
    done = smelt("heal", *words, "-o", tmp_path / "one", "--cached", "--json")
    assert done.code == 0, done.err
    recipe = yaml.safe_load((tmp_path / "one/smelt/heal.yaml").read_text())
    assert recipe["cache"]["top_k"] == 64 and recipe["text"]["train"][0]["location"] == str(text)
    assert done.json["steps"] == 2 and done.json["output"] == str(tmp_path / "one")

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "output": str(tmp_path / "unused")}))
    again = smelt("heal", file, "-o", tmp_path / "two")
    assert again.code == 0, again.err
    one, two = (tmp_path / n / "model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert "KL before" in again.out and "a lower bound" in again.out
    shown = json.loads((tmp_path / "two/smelt/healing.json").read_text())
    assert f"Written to {tmp_path / 'two'}" in again.out and shown["steps"] == 2


def test_what_is_missing_is_named(small, source, tmp_path):
    done = smelt("heal", small, "-o", tmp_path / "out")
    assert done.code == 2 and "--teacher ORIGINAL is missing" in done.err
    done = smelt("heal", small, "--teacher", source)
    assert done.code == 2 and "-o FOLDER is missing" in done.err
    done = smelt("heal", small, "--teacher", source, "-o", tmp_path / "o", "--train", "heads")
    assert done.code == 2 and "all" in done.err and "lora" in done.err
    assert not (tmp_path / "out").exists()
