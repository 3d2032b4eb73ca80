"""A study of two variants, and a stand-in for training that takes no time."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smelt.settings import check_recipe, dump_recipe
from smelt.study.settings import StudyRecipe
from smelt.study.store import Store

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import json, re, sys, time
from pathlib import Path

kind, path, *rest = sys.argv[1:]
folder = Path(path[: -len(".yaml")])
recipe = dict(re.findall(r"^(\\w+): (\\S.*)$", Path(path).read_text(), re.M))
home = Path(__file__).parent
with (home / "calls").open("a") as file:
    file.write(f"{kind} {folder.relative_to(Path(recipe['output']).parents[2])}\\n")
rules = json.loads((home / "rules.json").read_text())
name = f"{folder.parent.name}/{folder.name}"
if rules.get("seconds"):
    time.sleep(rules["seconds"])
if name in rules.get("fail", []):
    sys.exit("smelt: error: as it was told")
if kind == "evaluate":
    score = {"metric": "acc", "value": 0.5, "standard_error": 0.1, "n": 25, "chance": 0.5}
    score["source"] = "items"
    tasks = {task: {"scores": [score]} for task in json.loads(rest[0])["tasks"]}
    folder.with_name(folder.name + ".json").write_text(json.dumps({"tasks": tasks}))
    sys.exit(0)
nats = rules["nats"].get(folder.parent.name, {}).get(f"{float(recipe['learning_rate']):g}", 3.0)
if nats is None:
    folder.with_name(folder.name + ".json").write_text('{"diverged": "Training stopped at step 1"}')
    sys.exit(0)
(folder / "smelt").mkdir(parents=True)
(folder / "smelt" / "recipe.yaml").write_text(Path(path).read_text())
held_out = {"text": {"nats_per_token": nats + int(recipe["seed"]) / 1000}}
(folder / "smelt" / "training.json").write_text(json.dumps({
    "held_out": held_out,
    "checkpoints": [{"step": s, "held_out": {"text": nats + s / 100}} for s in (1, 2, 3)],
    "parameters": 1000,
    "tokens_per_second": 10.0,
    "peak_memory_bytes": 1000000,
}))
"""


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """The settings of a study: two variants, two seeds, a search, a second part that lends it."""
    return {
        "output": str(tmp_path / "study"),
        "reference": "ar-moe",
        "base": {
            "model": {
                "model_type": "samoe",
                "preset": "paper",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_experts": 4,
                "moe_every": 1,
                "max_position_embeddings": 32,
            },
            "tokenizer": {"vocab_size": 320},
            "text": {
                "train": ["python:train:prose"],
                "held_out": ["python:held-out:prose"],
                "tokens": 8192,
                "sequence_length": 32,
            },
            "steps": 20,
            "batch_size": 8,
            "warmup_steps": 4,
        },
        "variants": {
            "ar-moe": {"model.sharing": "none"},
            "samoe": {"model.sharing": "pool", "model.pool_size": 2},
        },
        "search": {"rates": [0.002, 0.004, 0.008], "tokens": 1280},
        "parts": {
            "core": {"variants": ["ar-moe", "samoe"], "seeds": [0, 1]},
            "size": {
                "variants": ["samoe"],
                "seeds": [0],
                "search": "core",
                "axes": {
                    "experts": {"E4": {}, "E8": {"model.num_experts": 8}},
                    "depth": {"L2": {}, "L4": {"model.num_hidden_layers": 4}},
                },
            },
        },
    }


@pytest.fixture
def make(values: dict[str, Any]) -> Callable[..., StudyRecipe]:
    """The study, with some settings changed by dotted names."""
    from smelt.study.settings import put

    def made(**changed: Any) -> StudyRecipe:
        for key, value in changed.items():
            put(values, key.replace("__", "."), value)
        return check_recipe(values, StudyRecipe)

    return made


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Set how the stand-in behaves; called without anything, what it was asked to do, in order."""
    from smelt.study import runner

    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(runner, "WORK", (sys.executable, "-I", "-S", str(tmp_path / "worker.py")))
    monkeypatch.setenv("SMELT_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "blimp").mkdir(parents=True)
    pair = {"UID": "a", "field": "b", "linguistics_term": "c", "pairID": "0"}
    pair |= {"sentence_good": "It is.", "sentence_bad": "It are."}
    with gzip.open(tmp_path / "data" / "blimp" / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(pair) + "\n")
    inside = {"ar-moe": {"0.002": 5.0, "0.004": 4.0, "0.008": 5.0}}
    inside["samoe"] = {"0.002": 5.0, "0.004": 4.5, "0.008": 4.8}

    def told(**rules: Any) -> list[str]:
        if rules or not (tmp_path / "rules.json").exists():
            rules = {"nats": inside} | rules
            (tmp_path / "rules.json").write_text(json.dumps(rules))
        calls = tmp_path / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    told()
    return told


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., None]:
    """Write what a finished run leaves, without running it."""

    def write(study: StudyRecipe, name: str, recipe: Any, nats: float, **more: Any) -> None:
        folder = Store(study.output).run(name) / "smelt"
        folder.mkdir(parents=True)
        dump_recipe(recipe, folder / "recipe.yaml")
        found = {
            "held_out": {"a": {"nats_per_token": nats - 0.5}, "b": {"nats_per_token": nats + 0.5}},
            "checkpoints": [{"step": i, "held_out": {"a": nats + i}} for i in (0, 1, 2)],
            "parameters": 1000,
            "tokens_per_second": 10.0,
            "peak_memory_bytes": 1_000_000,
        }
        (folder / "training.json").write_text(json.dumps(found | more))
        (folder.parent / "model.safetensors").touch()

    return write
