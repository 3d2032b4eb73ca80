"""A text that counts, and recipes that train on it in a fraction of a second."""

import json
import warnings

import pytest

from benchmarks import write_tasks
from healing_material import settings_of
from smelt.settings import check_recipe
from smelt.train.trainer import TrainRecipe, train

WORDS = "one two three four five six seven eight nine ten".split()
SWITCH = {
    "model_type": "switch_transformers",
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "dropout_rate": 0.0,
    "router_jitter_noise": 0.0,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Tokenised text lies in a folder of this test session, not in the user's."""
    folder = tmp_path_factory.getbasetemp() / "tokens"
    monkeypatch.setenv("SMELT_CACHE", str(folder))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Sentences that count: the next word follows from the last one."""
    folder = tmp_path_factory.mktemp("text")
    for split, numbers in (("train", range(400)), ("held_out", range(400, 440))):
        lines = (" ".join(WORDS[(n + i) % 10] for i in range(7 + n % 5)) + ".\n" for n in numbers)
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def samoe(text, tmp_path):
    """The settings of a SaMoE run of eight steps."""
    return {
        "model": {
            "model_type": "samoe",
            "preset": "paper",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "moe_every": 1,
            "max_position_embeddings": 32,
        },
        "tokenizer": {"vocab_size": 300},
        "text": {
            "train": [str(text / "train.txt")],
            "held_out": [str(text / "held_out.txt")],
            "tokens": 2000,
            "held_out_tokens": 300,
            "sequence_length": 16,
        },
        "output": str(tmp_path / "out"),
        "steps": 8,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "dtype": "float32",
        "log_every": 1,
        "evaluate_every": 100,
        "checkpoint_every": 3,
        "keep_checkpoints": 2,
    }


@pytest.fixture
def run():
    """Train with the settings, some of them changed; a warning that text is short is expected."""

    def train_quietly(values, *, on_step=None, **changes):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tokens found where.*")
            return train(check_recipe({**values, **changes}, TrainRecipe), on_step=on_step)

    return train_quietly


@pytest.fixture
def read_log():
    """The lines of a run's log that tell of its steps."""

    def read(folder, *names):
        lines = (folder / "smelt" / "log.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [[line[name] for name in names] for line in found if names[-1] in line]

    return read


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the students and teachers of healing lie, each made when it is first asked for."""
    return tmp_path_factory.mktemp("healing")


@pytest.fixture
def values(folder, tmp_path):
    """Of a form and a family: the settings of a healing run into this test's folder."""

    def make(form="mapped", family="qwen3_moe", **changes):
        return {**settings_of(folder, form, family), "output": str(tmp_path / "out"), **changes}

    return make


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Files of small benchmarks, as SMELT_DATA names them."""
    return write_tasks(tmp_path_factory.mktemp("tasks"), train=120)


@pytest.fixture(scope="session")
def started(text, tmp_path_factory):
    """A Switch model trained for a moment."""
    out = tmp_path_factory.mktemp("started") / "switch"
    recipe = {
        "model": SWITCH,
        "tokenizer": {"vocab_size": 400, "sentinels": 8},
        "text": {
            "train": [str(text / "train.txt")],
            "held_out": [str(text / "held_out.txt")],
            "tokens": 2000,
            "held_out_tokens": 200,
            "sequence_length": 32,
            "cache": str(tmp_path_factory.mktemp("cache")),
        },
        "output": str(out),
        "steps": 2,
        "batch_size": 4,
        "warmup_steps": 1,
        "dtype": "float32",
    }
    train(check_recipe(recipe, TrainRecipe))
    return out
