"""A page of a large plan: seconds to make it, its size, seconds to the first view in a browser.

    python benchmarks/report.py [--layers 48] [--experts 128] [--folder DIR]

The plan is smelt's own, of the shape of a model with 48 layers of 128 experts (D 2048, F 768, eight
per token), from routing statistics that are drawn, not measured: logits with a few common
directions, experts of very different popularity. Beside it stand drawn layer errors, scores and
decode times, so that every section has something to show. The command runs in a process of its own;
the page is opened in headless Chromium five times, each time in a new browser, at 360 and at
1440 pixels. Bounds: 10 s, 6 MB, 2 s.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import machine, save, show, times

BOUNDS = {"seconds": 10.0, "bytes": 6_000_000, "first view, ms": 2000.0}
REPEATS = 5
D, F, K, SAMPLE, TOKENS = 2048, 768, 8, 256, 4096
ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


def write_plan(folder: Path, num_layers: int, num_experts: int) -> None:
    """Statistics and the plan that smelt makes of them."""
    from smelt.compress.calibrate import RoutingStats
    from smelt.compress.decide import make_plan
    from smelt.compress.plan import LayerFacts
    from smelt.recipe import CompressRecipe

    expert = 3 * D * F
    names = [f"model.layers.{i}.mlp" for i in range(num_layers)]
    facts = [
        LayerFacts(name, i, num_experts, K, D, F, expert, 2 * expert, D, 2 * D, 4)
        for i, name in enumerate(names)
    ]
    layers = {name: drawn(num_experts, seed) for seed, name in enumerate(names)}
    stats = RoutingStats(layers, "c" * 64, "d" * 64, TOKENS)
    stats.save(folder / "stats")
    recipe = CompressRecipe(
        source="model", output="small", form="mapped", method="m-smoe-saliency", keep=0.5
    )
    plan = make_plan(
        facts,
        layers,
        recipe,
        other_params=1_000_000_000,
        other_bytes=2_000_000_000,
        checkpoint_hash=stats.checkpoint,
        statistics_hash="e" * 64,
        text_hash=stats.text,
    )
    plan.save(folder / "plan.json")


def drawn(num_experts: int, seed: int) -> Any:
    """Statistics of one layer, as if a router had seen `TOKENS` tokens."""
    import torch

    from smelt.routing import Accumulator, Routing

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    logits = normal(TOKENS, 12) @ normal(12, num_experts) + normal(TOKENS, num_experts)
    logits += 1.5 * normal(num_experts)
    weight, choice = logits.softmax(-1).topk(K)
    norms = 1 + normal(num_experts).abs()
    sums = Accumulator(num_experts, 8)
    experts = choice.flatten()
    sums.add_outputs(experts, weight.flatten(), norms[experts], normal(num_experts, 8))
    sums.add_routing(normal(TOKENS, 8), Routing(choice, weight, logits), torch.arange(SAMPLE))
    return sums.result()


def write_measurements(folder: Path, num_layers: int) -> None:
    """Drawn scores, layer errors and decode times of the original and three others."""
    import random

    from smelt.evaluate.results import Result
    from smelt.evaluate.results import save as save_results

    draw = random.Random(0)
    names = {"original": "c" * 64, "half": "1" * 64, "Q8_0": "2" * 64, "Q4_K": "3" * 64}

    def result(name: str, task: str, metric: str, value: float) -> Result:
        return Result(
            task=task,
            metric=metric,
            value=value,
            n=1000,
            standard_error=0.01,
            chance=None,
            seed=0,
            text=("notes.txt",) if task in ("perplexity", "fidelity") else (f"{task}/test",),
            text_sha256="f" * 64,
            checkpoint=name,
            fingerprint=names[name],
            dtype="bfloat16",
            device="cpu",
            plan_sha256=None,
            versions={"smelt": "0"},
            commit=None,
            time="2026-01-01T00:00:00+00:00",
        )

    found = [result(n, "perplexity", "bits per byte", 0.9 + draw.random() / 5) for n in names]
    found += [
        result(name, task, "acc", 0.4 + draw.random() / 4)
        for name in names
        for task in ("piqa", "boolq", "hellaswag", "arc_easy", "winogrande", "copa")
    ]
    found += [
        result("half", "fidelity", f"output error of model.layers.{i}.mlp", draw.random() / 2)
        for i in range(num_layers)
    ]
    save_results(found, folder / "results.json")
    write_bench(folder, names)


def write_bench(folder: Path, names: dict[str, str]) -> None:
    """Costs and decode times of checkpoints, by name and fingerprint."""
    from smelt.bench import file as bench_file
    from smelt.bench.file import Bench
    from smelt.bench.records import CheckpointCost, DecodeStep
    from smelt.bench.roofline import Rates

    sizes = dict(zip(names, (61e9, 33e9, 32e9, 18e9), strict=True))
    costs = [
        CheckpointCost(
            checkpoint=name,
            fingerprint=mark,
            folder_bytes=int(sizes[name]),
            dtype="bfloat16",
            peak_memory_bytes=int(sizes[name] * 1.1),
            flops_per_token=6.6e9,
        )
        for name, mark in names.items()
    ]
    steps = [
        DecodeStep(
            checkpoint=name,
            fingerprint=mark,
            batch=batch,
            context=0,
            steps=16,
            dtype="bfloat16",
            device="cpu",
            threads=1,
            turns=9,
            ms=sizes[name] / 1e9 * (1 + batch / 40),
            ms_median=sizes[name] / 1e9 * (1 + batch / 40),
            processor_ms=sizes[name] / 1e9 * (1 + batch / 40),
            flops=6.6e9 * batch,
            bytes_read=sizes[name] / 9 * (1 + batch / 20),
        )
        for name, mark in names.items()
        for batch in (1, 8, 32)
    ]
    rates = Rates(memory=2e10, flops={1: 4e10, 8: 2e11, 32: 6e11})
    machine = {"processor": "drawn", "threads": 1}
    bench = Bench(machine, rates, rates, {}, checkpoints=costs, decode=steps)
    bench_file.save(bench, folder / "bench.json")


def make_page(folder: Path) -> tuple[float, float]:
    """Seconds of the whole command and those of the processor; Python's start is among them."""
    page = folder / "report.html"
    page.unlink(missing_ok=True)
    words = ["plan.json", "stats", "--results", "results.json", "--bench", "bench.json"]
    begin, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-m", "smelt", "report", *words, "-o", page.name, "--quiet"],
        cwd=folder,
        check=True,
    )
    wall, after = time.perf_counter() - begin, os.times()
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def first_views(page: Path, width: int) -> dict[str, list[float]] | None:
    """Milliseconds from the navigation to the first paint, the load event, the first figure."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("no playwright: pip install playwright")
        return None
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        print("no browser: apt-get install chromium")
        return None
    found: dict[str, list[float]] = {"first view": [], "loaded": [], "first figure drawn": []}
    with sync_playwright() as play:
        for _ in range(REPEATS):
            browser = play.chromium.launch(executable_path=program, args=ARGUMENTS)
            view = browser.new_page(viewport={"width": width, "height": 800})
            view.add_init_script(
                "new PerformanceObserver((l) => { window.__paint = l.getEntries()[0].startTime; })"
                ".observe({type: 'largest-contentful-paint', buffered: true});"
            )
            view.goto(page.as_uri())
            for _ in range(100):
                if view.evaluate("window.__paint !== undefined"):
                    break
                view.wait_for_timeout(20)
            found["first view"].append(view.evaluate("window.__paint"))
            timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
            found["loaded"].append(view.evaluate(timing))
            begin = view.evaluate("performance.now()")
            view.evaluate("document.querySelector('figure').scrollIntoView({behavior: 'instant'})")
            while not view.evaluate("!!document.querySelector('figure .main-svg')"):
                view.wait_for_timeout(10)
            found["first figure drawn"].append(view.evaluate("performance.now()") - begin)
            browser.close()
    return found


def measure(folder: Path, num_layers: int, num_experts: int) -> dict[str, Any]:
    """All figures of one plan."""
    write_plan(folder, num_layers, num_experts)
    write_measurements(folder, num_layers)
    taken = [make_page(folder) for _ in range(3)]
    page = folder / "report.html"
    found: dict[str, Any] = {
        "layers": num_layers,
        "experts": num_experts,
        "seconds": times([wall for wall, _ in taken]),
        "processor seconds": times([used for _, used in taken]),
        "bytes": page.stat().st_size,
    }
    for width in (360, 1440):
        views = first_views(page, width)
        if views is not None:
            found[f"at {width} px"] = {name: times(values) for name, values in views.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="keep what is made there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder.resolve(), given.layers, given.experts)
    rows = [
        ["seconds to make it", found["seconds"]["median"], BOUNDS["seconds"]],
        ["seconds of the processor", found["processor seconds"]["median"], ""],
        ["bytes", f"{found['bytes']:,}", f"{BOUNDS['bytes']:,}"],
    ]
    for width in (360, 1440):
        for name, taken in found.get(f"at {width} px", {}).items():
            bound = BOUNDS["first view, ms"] if name == "first view" else ""
            rows.append([f"{name}, {width} px, ms", taken["median"], bound])
    show(f"A page of {given.layers} × {given.experts} experts", ["what", "median", "bound"], rows)
    save("report", {"machine": machine(), "bounds": BOUNDS, "page": found})


if __name__ == "__main__":
    main()
