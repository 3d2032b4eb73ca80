"""What the tests of healing share: a tiny original, what compression made of it, settings."""

import warnings
from functools import cache
from pathlib import Path

from commands import TEXT, make_source
from smelt import api
from smelt.settings import check_recipe
from smelt.train.heal import heal
from smelt.train.heal_settings import HealRecipe


@cache
def original(folder: Path, family: str) -> Path:
    """A random checkpoint of eight experts; of Switch, with a tokenizer that has sentinels."""
    if family == "qwen3_moe":
        return make_source(folder / family, family)
    from checkpoints import save
    from smelt.text.sources import parse_source
    from smelt.train.data import train_tokenizer

    source = parse_source(str(text(folder)))
    tokenizer = train_tokenizer([source], vocab_size=300, num_sentinels=8)
    place = save(family, folder / family, vocab_size=len(tokenizer), dropout_rate=0.0)
    tokenizer.save_pretrained(place)
    return place


@cache
def student(folder: Path, form: str, family: str) -> Path:
    """Half of its experts, in a form."""
    method = {"stock": "reap", "mapped": "m-smoe"}[form]
    settings = {"text": [str(text(folder))], "num_tokens": 3000, "sequence_length": 32}
    settings["reconstruct"] = False
    place = folder / f"{family}-{form}"
    source = original(folder, family)
    return api.compress(source, place, experts=4, form=form, method=method, **settings)


def text(folder: Path) -> Path:
    """Some text to heal on."""
    file = folder / "heal.txt"
    if not file.exists():
        file.write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    return file


def settings_of(folder: Path, form: str = "mapped", family: str = "qwen3_moe") -> dict:
    """A healing run of eight steps."""
    return {
        "student": str(student(folder, form, family)),
        "teacher": str(original(folder, family)),
        "text": {
            "train": [str(text(folder))],
            "held_out": [str(text(folder))],
            "tokens": 1500,
            "held_out_tokens": 300,
            "sequence_length": 16,
        },
        "steps": 8,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "log_every": 1,
        "evaluate_every": 100,
        "checkpoint_every": 3,
    }


def run(values: dict, *, on_step=None, **changes) -> dict:
    """Heal with these settings, some of them changed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tokens found where.*")
        return heal(check_recipe({**values, **changes}, HealRecipe), on_step=on_step)
