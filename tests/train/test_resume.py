"""Laws of stopping and going on: a killed run ends as if nothing had happened, or says why not."""

import builtins
import errno
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from smelt.errors import CheckpointError, RecipeError
from smelt.settings import check_recipe
from smelt.train import checkpoints, step
from smelt.train.faults import DivergedError
from smelt.train.measure import forward
from smelt.train.resume import unfinished
from smelt.train.settings import TrainRecipe

QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
TOLD = ("step", "tokens", "balance", "gradient_norm", "learning_rate", "nats")


class Kill(BaseException):
    """Something that nobody catches."""


def killed_after(last):
    def on_step(step, steps, nats):
        if step == last:
            raise Kill

    return on_step


@pytest.fixture
def killed(samoe, run, tmp_path):
    """A run that was killed at step 5; its last checkpoint is of step 3 (or as told)."""

    def make(*, last=3, **changes):
        with pytest.raises(Kill):
            run(samoe, on_step=killed_after(5), **changes)
        assert (tmp_path / "out.partial" / "smelt" / f"checkpoint-{last}").is_dir()

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"attention_dropout": 0.2}, "log_every": 2},  # a sum begun before the kill
        {"objective": "masked", "accumulate": 2},
        {"model": QWEN, "dtype": "bfloat16"},  # its experts are saved in another layout
    ],
    ids=["samoe", "masked", "qwen3_moe"],
)
def test_a_killed_run_ends_as_if_it_had_not_been(samoe, run, read_log, killed, tmp_path, changes):
    values = dict(samoe)
    if "model" in changes:
        base = {} if changes["model"] is QWEN else samoe["model"]
        values["model"] = {**base, **changes["model"]}
    values |= {name: value for name, value in changes.items() if name != "model"}
    whole = run(values, output=str(tmp_path / "whole"))
    killed(**values)
    steps = []
    resumed = run(values, on_step=lambda step, *_: steps.append(step))
    assert steps == [4, 5, 6, 7, 8]
    assert read_log(tmp_path / "out", *TOLD) == read_log(tmp_path / "whole", *TOLD)
    for name in ("held_out", "checkpoints", "expert_counts"):
        assert resumed[name] == whole[name]
    files = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*")}
    assert files == {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*")}
    for name in files:
        if name.suffix == ".safetensors":
            same = (tmp_path / "out" / name).read_bytes() == (
                tmp_path / "whole" / name
            ).read_bytes()
            assert same, name


def test_a_run_killed_before_its_first_checkpoint_begins_anew(samoe, run, tmp_path):
    with pytest.raises(Kill):
        run(samoe, on_step=killed_after(2))
    assert not (tmp_path / "out.partial").exists()
    steps = []
    run(samoe, steps=3, on_step=lambda step, *_: steps.append(step))
    assert steps == [1, 2, 3]


def test_a_checkpoint_that_was_being_written_is_not_trusted(samoe, run, killed, tmp_path):
    killed(last=4, checkpoint_every=2)
    torn = tmp_path / "out.partial" / "smelt" / "checkpoint-4" / "smelt_state.json"
    torn.unlink()  # it is written last
    steps = []
    run(samoe, checkpoint_every=2, on_step=lambda step, *_: steps.append(step))
    assert steps[0] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01 and is 0.02"),
        ({"steps": 9}, "steps was 8 and is 9"),
        ({"seed": 1}, "seed was 0 and is 1"),
    ],
)
def test_another_recipe_does_not_go_on(samoe, run, killed, tmp_path, changes, message):
    killed()
    with pytest.raises(RecipeError, match=f"{message}.*Restore them.*or remove that folder"):
        run(samoe, **changes)
    assert (tmp_path / "out.partial" / "smelt" / "checkpoint-3").is_dir()


def test_another_text_does_not_go_on(samoe, run, tmp_path, text):
    path = tmp_path / "train.txt"
    path.write_text((text / "train.txt").read_text())
    values = {**samoe, "text": {**samoe["text"], "train": [str(path)]}}
    with pytest.raises(Kill):
        run(values, on_step=killed_after(5))
    path.write_text(path.read_text().replace("one", "six"))
    with pytest.raises(RecipeError, match="the content of the (tokenizer|training text) is"):
        run(values)


def test_settings_that_change_no_weight_may_change(samoe, run, killed):
    killed()
    steps = []
    run(samoe, log_every=2, on_step=lambda step, *_: steps.append(step))
    assert steps[0] == 4


def test_where_an_unfinished_run_lies_is_known(samoe, killed, tmp_path):
    recipe = check_recipe(samoe, TrainRecipe)
    assert unfinished(recipe) is None
    killed()
    assert unfinished(recipe) == tmp_path / "out.partial"


def test_a_finished_run_is_not_overwritten(samoe, run):
    run(samoe, steps=1)
    with pytest.raises(RecipeError, match="exists already"):
        run(samoe, steps=1)


# --- a loss that is no number --------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    samoe, run, tmp_path, monkeypatch
):
    calls = []

    def breaking(model, inputs):
        calls.append(model.training)
        if calls.count(True) == 5:
            with torch.no_grad():
                model.model.layers[1].mlp.router.weight[0, 0] = float("inf")
        return forward(model, inputs)

    monkeypatch.setattr(step, "forward", breaking)
    told = []
    with pytest.raises(
        DivergedError,
        match=r"stopped at step 5: .* first seen in the weights of model.layers.1.mlp",
    ) as caught:
        run(samoe, on_step=lambda step, *_: told.append(step))
    assert told == [1, 2, 3, 4]
    kept = tmp_path / "out.partial" / "smelt" / "checkpoint-3"
    assert str(kept) in str(caught.value)
    model = AutoModelForCausalLM.from_pretrained(kept)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("part", "where"),
    [("output", "in the output of model.layers.1.attention"), ("gradient", "in the gradient of")],
)
def test_it_says_where_the_numbers_end(samoe, run, monkeypatch, part, where):
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * float("nan") if part == "output" else value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    def breaking(model, inputs):
        layer = model.model.layers[1].attention
        handle = layer.register_forward_hook(
            lambda _, __, out: (Break.apply(out[0]), *out[1:]),
            prepend=True,  # before the hooks that look
        )
        try:
            return forward(model, inputs)
        finally:
            handle.remove()

    monkeypatch.setattr(step, "forward", breaking)
    with pytest.raises(DivergedError, match=where):
        run(samoe)


# --- a full disk ---------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["optimizer", "weights"])
def test_a_full_disk_says_so_and_leaves_the_checkpoint_before(
    samoe, run, tmp_path, monkeypatch, place
):
    on_step = None
    if place == "weights":  # those of step 6 and 8 are kept

        def on_step(number, *_):
            if number == 8:
                monkeypatch.setattr(checkpoints, "write", no_space)
    else:

        def on_step(number, *_):
            if number == 6:
                monkeypatch.setattr(torch, "save", no_space)

    expected = 6 if place == "weights" else 3
    with pytest.raises(
        CheckpointError, match=f"the disk is full. It is kept up to step {expected}"
    ):
        run(samoe, on_step=on_step)
    folder = tmp_path / "out.partial" / "smelt"
    assert max(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")) == expected
    monkeypatch.undo()
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "tokens"))
    steps = []
    run(samoe, on_step=lambda step, *_: steps.append(step))
    assert steps[0] == expected + 1


def test_a_missing_tensorboard_is_one_clear_error(samoe, run, monkeypatch, tmp_path):
    original = builtins.__import__

    def without(name, *rest):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RecipeError, match=r"pip install 'smelt\[tensorboard\]'"):
        run(samoe, tensorboard=True)
    assert not (tmp_path / "out.partial").exists()


# --- several seeds -------------------------------------------------------------------------------


def test_several_seeds_are_runs_of_their_own_and_go_on_where_they_stopped(samoe, run, tmp_path):
    several = {**samoe, "seeds": [0, 2]}
    steps = []

    def on_step(number, total, nats):
        steps.append((number, total))
        if number == 8 + 5:
            raise Kill

    with pytest.raises(Kill):
        run(several, on_step=on_step)
    assert steps[-1] == (13, 16)
    assert unfinished(check_recipe(several, TrainRecipe)) == tmp_path / "out" / "seed-2.partial"
    steps.clear()
    result = run(several, on_step=lambda number, total, _: steps.append((number, total)))
    assert steps[0] == (8 + 4, 16)  # the first seed is done, the second goes on after step 3

    single = run(samoe, seed=2, output=str(tmp_path / "single"))
    (name,) = single["held_out"]
    nats = [
        json.loads((tmp_path / f"out/seed-{seed}/smelt/training.json").read_text())["held_out"][
            name
        ]["nats_per_token"]
        for seed in (0, 2)
    ]
    assert nats[1] == single["held_out"][name]["nats_per_token"]
    assert result["held_out"][name]["nats_per_token"] == pytest.approx(sum(nats) / 2)
    assert result["held_out"][name]["standard_deviation"] == pytest.approx(
        abs(nats[0] - nats[1]) / 2**0.5
    )
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == result

    # all are done: the same again, and no step
    assert run(several, on_step=killed_after(1)) == result
    with pytest.raises(RecipeError, match="seed-0 holds a run with other settings: learning_rate"):
        run(several, learning_rate=1e-3)
