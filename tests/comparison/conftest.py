"""A comparison on two benchmarks, and a stand-in for all work that takes no time."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smelt.comparison.settings import ComparisonRecipe
from smelt.settings import check_recipe
from smelt.study.settings import put

WORKER = """
import json, re, sys
from pathlib import Path

text = Path(sys.argv[1]).read_text()
top = dict(re.findall(r"^(\\w+): (\\S.*)$", text, re.M))
result, model, home = Path(top["result"]), Path(top["model"]), Path(__file__).parent
name = str(result).split("/cells/")[1][: -len(".json")]
with (home / "calls").open("a") as file:
    file.write(name + "\\n")
rules = json.loads((home / "rules.json").read_text())
if name in rules.get("fail", []):
    sys.exit("smelt: error: as it was told")
made = {"is_done": True, "seconds": {}, "settings": json.loads(rules["settings"].get(name, "{}"))}
made["full"] = rules.get("full", "a")
if top["kind"] == "trial":
    made["loss"] = rules["loss"][name.split("/")[-1]]
else:
    model.mkdir(parents=True, exist_ok=True)
    (model / "model.safetensors").write_text("weights")
    if top["kind"] == "full":
        Path(top["stats"]).mkdir(parents=True, exist_ok=True)
        (Path(top["stats"]) / "stats.json").write_text("{}")
    rate = re.search(r"^heal:\\n(?:  .*\\n)*?  learning_rate: (\\S+)", text, re.M)
    made["learning_rate"] = float(rate[1]) if rate else None
    labels = [0, 1, 0, 0, 1, 1, 0, 0] if name.endswith("other") else [0, 1, 0, 1, 0, 0, 1, 1]
    made["plan"] = {"layer": {"operator": "merge", "dominants": [0, 1], "labels": labels}}
    hits = 5 + rules.get("hits", {}).get(name.split("/")[-1], 0)
    error = rules.get("error", 0.1)
    metric = {"value": hits / 10, "standard_error": error, "n": 10, "unit": "items"}
    metric["without_a_model"] = {"majority of training": 0.5}
    made["metrics"] = {"accuracy": metric}
    made["items"], made["sha256"] = "items", "0"
    costs = ("experts", "parameters", "nonzero_parameters", "parameters_of_experts", "bytes")
    flops = ("moe_flops_per_token", "flops_per_token")
    made["costs"] = dict.fromkeys(costs + flops, 100)
    values = {str(i): float(i < hits) for i in range(10)}
    beside = result.with_name(result.name.replace(".json", ".outcomes.json"))
    beside.write_text(json.dumps({"values": {"accuracy": values}, "answers": {}}))
part = result.with_name(result.name + ".part")
part.write_text(json.dumps(made))
part.replace(result)
"""


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """The settings: three ways to merge and one that decomposes, a search, two parts."""
    return {
        "kind": "comparison",
        "output": str(tmp_path / "compared"),
        "start": str(tmp_path / "start"),
        "fine_tune": {"steps": 4, "warmup_steps": 1},
        "tasks": {"sst2": {"fine_tune": {"steps": 6}}, "mrpc": {"heal": {"steps": 30}}},
        "calibration": {"task": {"limit": 8}},
        "compress": {"experts": 4, "budget": "global", "excluded": [0]},
        "heal": {"steps": 20, "distill": {"weight": 0.2}},
        "variants": {
            "m-smoe": {"compress": {"method": "m-smoe"}},
            "average": {"base": "m-smoe", "compress": {"method": "average"}, "rate": "m-smoe"},
            "mc-smoe": {"base": "m-smoe", "heal": {"decompose": {"rank": 4}}},
            "twice": {"after": "m-smoe", "heal": {"decompose": {"rank": 4}}, "rate": "mc-smoe"},
            "unhealed": {"base": "m-smoe", "heal": None},
            "other": {"base": "m-smoe", "compress": {"similarity": "random"}, "rate": "m-smoe"},
        },
        "heal_search": {"rates": [0.001, 0.002], "heal": {"steps": 5}, "extensions": 0},
        "parts": {
            "main": {
                "variants": ["m-smoe", "average", "mc-smoe", "twice"],
                "tasks": ["sst2"],
                "seeds": [0, 1],
            },
            "more": {"variants": ["other", "unhealed"], "tasks": ["sst2"], "seeds": [0]},
        },
        "focus": "m-smoe",
        "resamples": 100,
    }


@pytest.fixture
def make(values: dict[str, Any]) -> Callable[..., ComparisonRecipe]:
    """The comparison, with some settings changed by dotted names."""

    def made(**changed: Any) -> ComparisonRecipe:
        for key, value in changed.items():
            put(values, key.replace("__", "."), value)
        return check_recipe(values, ComparisonRecipe)

    return made


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Set how the stand-in behaves; called without anything, what it was asked to do, in order."""
    from smelt.comparison import runner

    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("SMELT_DATA", str(tmp_path))  # the stand-in reads no task files
    monkeypatch.setattr(runner, "WORK", (sys.executable, "-I", "-S", str(tmp_path / "worker.py")))

    def told(**rules: Any) -> list[str]:
        if rules or not (tmp_path / "rules.json").exists():
            loss = {"rate-0.001": -0.6, "rate-0.002": -0.5}
            (tmp_path / "rules.json").write_text(json.dumps({"loss": loss, "settings": {}} | rules))
        calls = tmp_path / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    told()
    return told
