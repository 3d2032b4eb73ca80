"""Two compressed checkpoints of one tiny original, and hand-made measurements of all three."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from commands import QUICK, make_source, smelt, text_file
from smelt.checkpoint.source import Checkpoint
from smelt.evaluate.results import Result, save


@dataclass(frozen=True)
class Ground:
    """Where everything is."""

    folder: Path
    source: Path
    merged: Path  # mapped, with usage
    dropped: Path  # stock
    fingerprints: Mapping[str, str]  # of source, merged, dropped
    results: Path
    bench: Path
    analysis: Path

    @property
    def layers(self) -> list[str]:
        plan = json.loads((self.merged / "smelt" / "plan.json").read_text())
        return [layer["name"] for layer in plan["layers"]]


def result(fingerprint: str, **changes: Any) -> Result:
    """A record; 'bits per byte' on notes.txt unless it is said otherwise."""
    values = {
        "task": "perplexity",
        "metric": "bits per byte",
        "value": 1.0,
        "n": 500,
        "standard_error": 0.05,
        "chance": None,
        "seed": 0,
        "text": ("texts/notes.txt",),
        "text_sha256": "a" * 64,
        "checkpoint": fingerprint[:4],
        "fingerprint": fingerprint,
        "dtype": "float32",
        "device": "cpu",
        "plan_sha256": None,
        "versions": {"smelt": "0", "lm_eval": "1"},
        "commit": None,
        "time": "2026-01-01T00:00:00+00:00",
    }
    return Result(**values | changes)  # type: ignore[arg-type]


def bench_file(path: Path, fingerprints: Mapping[str, str], **changes: Any) -> Path:
    """A bench file of these checkpoints: the later ones are smaller and faster."""
    names = list(fingerprints)
    costs = [
        {
            "checkpoint": name,
            "fingerprint": fingerprints[name],
            "folder_bytes": 1000 - 300 * i,
            "peak_memory_bytes": 2000 - 300 * i,
            "flops_per_token": 500.0,
            "dtype": "float32",
        }
        for i, name in enumerate(names)
    ]
    steps = [
        {
            "checkpoint": name,
            "fingerprint": fingerprints[name],
            "batch": batch,
            "context": 0,
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
            "turns": 3,
            "steps": 4,
            "processor_ms": 2.0,
            "ms": 2.0,
            "ms_median": 2.5 * batch - 0.5 * i,
            "flops": 1e6 * batch,
            "bytes_read": 1e6,
        }
        for i, name in enumerate(names)
        for batch in (1, 4)
    ]
    rates = {"memory": 1e10, "cache": None, "flops": {"1": 2e10, "4": 4e10}}
    value = {
        "version": 2,
        "kind": "bench",
        "machine": {"processor": "test", "threads": 1},
        "rates": rates,
        "processor_rates": rates,
        "quiet": {"is_quiet": False, "reasons": ["turns vary"]},
        "checkpoints": costs,
        "decode": steps,
        "prefill": [],
    }
    path.write_text(json.dumps(value | changes))
    return path


def analysis_value() -> dict[str, Any]:
    """What `smelt analyse` writes of one SaMoE run, as far as a page reads it."""
    one = {"mean": 0.5, "sd": None, "n": 1}
    alpha = {
        "values": [[[1.0], [0.2]], [[-0.3], [0.9]]],
        "columns": ["all"],
        "effective_rank": [1.7],
        "highest_rank": 2,
        "distance_from_one_hot": [[0.02], [None]],
        "farthest_from_one_hot": 0.29,
    }
    gradients = {
        "contributions": [{"layers": [0, 1], "cosine": [[1.0, 0.4], [0.4, 1.0]], "alignment": 1.4}]
    }
    layers = [{"block": i, "norm": one, "snr": one} for i in range(2)]
    return {
        "version": 1,
        "runs": [
            {
                "run": "pool",
                "mixing": {"alpha": alpha, "beta": {"values": [1.0, 0.9]}},
                "gradients": gradients,
            }
        ],
        "variants": [
            {
                "variant": "SaMoE",
                "gradients": {"experts_by_layer": layers},
                "similarity": {"cka": {"mean": [[1.0, 0.5], [0.5, 1.0]], "sd": None, "n": 1}},
            }
        ],
    }


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("report")
    source = make_source(folder / "source")
    text = text_file(folder)
    merged, dropped = folder / "merged", folder / "dropped"
    for place, words in ((merged, ("--form", "mapped")), (dropped, ())):
        done = smelt("compress", source, place, "--keep", 0.5, "--text", text, *QUICK, *words)
        assert done.code == 0, done.err
    places = {"source": source, "merged": merged, "dropped": dropped}
    marks = {name: Checkpoint.open(place).fingerprint for name, place in places.items()}
    layers = json.loads((merged / "smelt" / "plan.json").read_text())["layers"]
    found = [
        result(mark, checkpoint=name, value=value)
        for (name, mark), value in zip(marks.items(), (1.0, 1.2, 1.3), strict=True)
    ]
    found += [
        result(
            mark,
            checkpoint=name,
            task=task,
            metric="acc",
            value=0.5,
            chance=0.25,
            text=(f"{task}/test",),
            text_sha256=task * 8,
        )
        for name, mark in marks.items()
        for task in ("piqa", "copa")
    ]
    found += [
        result(
            marks["merged"],
            checkpoint="merged",
            task="fidelity",
            metric=f"output error of {layer['name']}",
            value=0.1 * (i + 1),
            standard_error=None,
        )
        for i, layer in enumerate(layers)
    ]
    save(found, folder / "results.json")
    (folder / "analysis").mkdir()
    (folder / "analysis" / "analysis.json").write_text(json.dumps(analysis_value()))
    bench = bench_file(folder / "bench.json", marks)
    return Ground(
        folder, source, merged, dropped, marks, folder / "results.json", bench, folder / "analysis"
    )


@pytest.fixture(scope="session")
def page(ground: Ground) -> Path:
    """A page with every section but stable rank and studies."""
    from smelt.report.make import make_report

    place = ground.folder / "page.html"
    paths = [ground.merged, ground.dropped, ground.analysis]
    make_report(paths, place, results=[ground.results], bench=[ground.bench])
    return place


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Result]:
    return result


@pytest.fixture(scope="session")
def make_bench() -> Callable[..., Path]:
    return bench_file


@pytest.fixture
def results_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes records to a file of their own."""

    def write(*found: Result, name: str = "some.json") -> Path:
        save(found, tmp_path / name)
        return tmp_path / name

    return write
