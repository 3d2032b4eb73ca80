"""Laws of stopping and going on: a killed healing ends as if nothing had happened."""

import json

import pytest

from healing_material import run, student
from smelt.errors import RecipeError

TOLD = ("step", "nats", "kl", "kept", "gradient_norm", "learning_rate")


class Kill(BaseException):
    """Something that nobody catches."""


def killed_after(last):
    def on_step(step, steps, nats):
        if step == last:
            raise Kill

    return on_step


def log(place):
    lines = map(json.loads, (place / "smelt/heal-log.jsonl").read_text().splitlines())
    return [[line.get(name) for name in TOLD] for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {"log_every": 2, "accumulate": 2},  # a sum begun before the kill
        {"cache": {"top_k": 8}, "train": "lora"},
        {"decompose": {"rank": 4, "initial": 0.2}},
    ],
    ids=["live", "cached-lora", "decompose"],
)
def test_a_killed_healing_ends_as_if_it_had_not_been(values, tmp_path, changes):
    given = values("mapped", **changes)
    whole = run(given, output=str(tmp_path / "whole"))
    with pytest.raises(Kill):
        run(given, on_step=killed_after(5))
    assert (tmp_path / "out.partial/smelt/checkpoint-3").is_dir()
    steps = []
    resumed = run(given, on_step=lambda step, *_: steps.append(step))
    assert steps == [4, 5, 6, 7, 8]
    assert log(tmp_path / "out") == log(tmp_path / "whole")
    for name in ("before", "after", "hashes", "parameters"):
        assert resumed[name] == whole[name]
    files = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*")}
    assert files == {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*")}
    for name in ("model.safetensors", "config.json", "smelt/sha256.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_recipe_or_student_does_not_go_on(values, folder, tmp_path):
    given = values("mapped", steps=6, checkpoint_every=1)
    with pytest.raises(Kill):
        run(given, on_step=killed_after(2))
    with pytest.raises(RecipeError, match=r"distill.weight was 0.2 and is 0.5"):
        run(given, distill={"weight": 0.5})
    other = student(folder, "stock", "qwen3_moe")
    with pytest.raises(RecipeError, match="unfinished run with other settings: student was"):
        run(given, student=str(other))
    assert (tmp_path / "out.partial/smelt/checkpoint-1").is_dir()


def test_a_run_killed_before_its_first_checkpoint_leaves_nothing(values, tmp_path):
    with pytest.raises(Kill):
        run(values("mapped"), on_step=killed_after(1))
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
