"""Bad input of healing: one error that says what was given and what to do, before any training."""

import builtins
import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from checkpoints import save
from healing_material import original, run, student
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError, RecipeError
from smelt.settings import check_recipe
from smelt.train.heal_model import check_pair
from smelt.train.heal_settings import HealRecipe

NAMES = {"student": "a", "teacher": "b", "output": "c"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5, "decompose": {"initial": 0.5, "final": 0.5}}, r"T ≤ T_i \+ T_f"),
        ({"learning_rate": 0}, "learning_rate 0 trains nothing; with decompose it prunes"),
        ({"distill": {"preset": "faithful"}, "cache": {}}, "leave cache out"),
        ({"spans": {"redraw": True}, "cache": {}}, "leave redraw or cache out"),
        ({"train": "routers", "decompose": {}}, "decompose trains the experts"),
        ({"distill": {"weight": 0, "cross_entropy": 0}}, "nothing to learn"),
        ({"batch_size": 6, "accumulate": 4}, "equal micro-batches"),
        ({"text": {}, "task": {"name": "sst2"}}, "either text or task"),
        ({"temperature": 3}, "temperature"),
        ({"decompose": {"keep": 0}}, "keep"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        check_recipe({**NAMES, **settings}, HealRecipe)


def test_learning_rate_0_is_for_decompose():
    recipe = check_recipe({**NAMES, "learning_rate": 0, "decompose": {}}, HealRecipe)
    assert recipe.loop().learning_rate == 0


def test_each_way_of_training_has_a_learning_rate_of_its_own():
    rates = {t: check_recipe({**NAMES, "train": t}, HealRecipe).rate for t in ("all", "routers")}
    assert rates["routers"] == 5e-5 and rates["all"] > rates["routers"]


def test_a_teacher_with_another_vocabulary_or_tokenizer_is_refused(folder, tmp_path):
    pupil = Checkpoint.open(student(folder, "mapped", "qwen3_moe"))
    larger = save("qwen3_moe", tmp_path / "larger", vocab_size=320)
    pupil.tokenizer.save_pretrained(larger)
    with pytest.raises(CheckpointError, match="vocabulary of 320 tokens, the student 300"):
        check_pair(pupil, Checkpoint.open(larger))
    other = tmp_path / "other"
    shutil.copytree(original(folder, "qwen3_moe"), other)
    spelt = json.loads((other / "tokenizer.json").read_text())
    words = spelt["model"]["vocab"]
    first, second = sorted(words, key=words.get)[10:12]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(spelt))
    with pytest.raises(CheckpointError, match=r"another tokenizer \(.* is token 1[01] there"):
        check_pair(pupil, Checkpoint.open(other))


def test_a_student_of_another_original_is_a_warning(folder, tmp_path):
    pupil = Checkpoint.open(student(folder, "mapped", "qwen3_moe"))
    check_pair(pupil, Checkpoint.open(original(folder, "qwen3_moe")))
    other = save("qwen3_moe", tmp_path / "other", vocab_size=300, seed=5)
    pupil.tokenizer.save_pretrained(other)
    with pytest.warns(UserWarning, match="was made from checkpoint .* is not its original"):
        check_pair(pupil, Checkpoint.open(other))


def test_an_output_that_exists_is_refused(values, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").touch()
    with pytest.raises(RecipeError, match="exists already"):
        run(values("mapped"))


def test_missing_peft_is_one_clear_error(values, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RecipeError, match=r"pip install 'smelt\[lora\]'"):
        run(values("mapped", train="lora"))


def test_the_student_is_never_written_to(values, folder, tmp_path):
    place = student(folder, "stock", "qwen3_moe")
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    run(values("stock"), steps=1)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    AutoModelForCausalLM.from_pretrained(place)
