"""A full-size switch-base-32 through M-SMoE and MC-SMoE: parameters, bytes on disk, FLOPs.

    python benchmarks/identities.py [--quick] [--folder DIR]

The weights are random, so that quality means nothing here; sizes mean everything. Four rows: the
checkpoint; merged to 8 experts a layer on average, the first sparse layer of the encoder left out;
the same decomposed (rank 32, 10 % of the entries of S); decomposed without merging. What was
published for them (M-SMoE, arXiv:2310.01334) stands beside what lies on disk. FLOPs are counted for
128 tokens on each side.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

from _checkpoints import switch
from _report import machine, save, show

GIB = 1 << 30
HERE = Path(__file__).parent
PUBLISHED = {"full": 1978.5, "M-SMoE": 732.8, "MC-SMoE": 380.7, "compressed only": 570.2}
_MERGED = {"experts": 8, "method": "m-smoe", "budget": "global", "excluded": [0]}
_DECOMPOSED = {"rank": 32, "keep": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "M-SMoE": _MERGED,
    "MC-SMoE": {**_MERGED, "decompose": _DECOMPOSED},
    "compressed only": {**_MERGED, "experts": 32, "decompose": _DECOMPOSED},
}
SMALL = {"d_model": 64, "d_ff": 256, "num_heads": 4, "d_kv": 16, "vocab_size": 1024}
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "BOOL")

JOB = """
import resource, sys
from smelt.compress.calibrate import RoutingStats
from smelt.compress.pipeline import run_compress
from smelt.recipe import CompressRecipe

recipe = CompressRecipe.model_validate_json(sys.argv[1])
stats = RoutingStats.load(sys.argv[2])
run_compress(recipe, stats=stats, verify=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""
"""One compression in a process of its own, so that its peak memory is its own."""


def calibrate(source: Path, folder: Path, tokens: int) -> Path:
    """The statistics that every variant is made from."""
    command = [sys.executable, "-m", "smelt", "calibrate", str(source), str(folder / "stats")]
    options = ["--tokens", str(tokens), "--set", "sequence_length=128", "-q", "--no-verify"]
    subprocess.run([*command, *options], check=True)
    return folder / "stats"


def compress(source: Path, stats: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One variant, and what lies on disk afterwards."""
    recipe = {"source": str(source), "output": str(folder), "form": "mapped", **settings}
    begin = time.perf_counter()
    command = [sys.executable, "-c", JOB, json.dumps(recipe), str(stats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - begin
    plan = json.loads((folder / "smelt" / "plan.json").read_text())
    predicted = plan["predicted"]
    return on_disk(folder) | {
        "predicted_bytes": predicted["bytes_after"],
        "predicted_params": predicted["params_after"],
        "experts": sum(layer["num_groups"] for layer in plan["layers"]),
        "seconds": seconds,
        "peak": int(done.stdout.split()[-1]),
    }


def on_disk(folder: Path) -> dict[str, Any]:
    """Parameters and bytes of the tensors of a folder; numbers of rows are no parameters."""
    from smelt.checkpoint.shards import read_header

    entries = [e for f in folder.glob("*.safetensors") for e in read_header(f).values()]
    floats = [e for e in entries if e.dtype.is_floating_point]
    return {
        "params": sum(prod(e.shape) for e in floats),
        "bytes": sum(e.num_bytes for e in entries),
        "bytes_per_param": floats[0].dtype.itemsize,
    }


def flops(config: dict[str, Any], decomposed_layers: tuple[int, int], expert: float) -> float:
    """Of one forward per token of the source and one of the target, 128 of each; counted by hand.

    Args:
        decomposed_layers: sparse layers of encoder and decoder whose experts are decomposed.
        expert: parameters of a decomposed expert.
    """
    D, F, length = config["d_model"], config["d_ff"], 128
    inner = config["num_heads"] * config["d_kv"]
    attention, dense = 4 * D * inner, 2 * D * F
    N, n = config["num_layers"], config["num_decoder_layers"]
    sparse = config["num_sparse_encoder_layers"] + config["num_sparse_decoder_layers"]
    products = (N + 2 * n) * (attention + 2 * inner * length) + (N + n) * dense
    products += sparse * D * config["num_experts"] + D * config["vocab_size"]
    return 2 * (products - sum(decomposed_layers) * (dense - expert))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, some seconds")
    parser.add_argument("--folder", help="where the checkpoints go for a while (10 GB)")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = switch(**(SMALL if options.quick else {}))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="smelt-identities-", dir=options.folder) as name:
        folder = Path(name)
        source = folder / "source"
        arguments = [str(source), json.dumps(config), "bfloat16"]
        subprocess.run([sys.executable, HERE / "_checkpoints.py", *arguments], check=True)
        results["full"] = on_disk(source) | {"experts": 12 * 32}
        stats = calibrate(source, folder, 2048 if options.quick else 8192)
        for variant, settings in VARIANTS.items():
            print(f"{variant} …", flush=True)
            results[variant] = compress(source, stats, folder / variant, settings)
    one = (results["MC-SMoE"]["params"] - results["M-SMoE"]["params"]) / 88
    expert = 2 * config["d_model"] * config["d_ff"] + one
    full = flops(config, (0, 0), 0)
    for variant, row in results.items():
        row["flops"] = full
        if variant in ("MC-SMoE", "compressed only"):
            row["flops"] = flops(config, (5, 6), expert)
        row["published"] = PUBLISHED[variant]
    rows = [
        (
            variant,
            row["experts"],
            f"{row['params'] / 1e6:.1f} M",
            f"{row['published']} M",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['bytes'] / row['params'] / row['bytes_per_param'] - 1:+.2%}",
            f"{row['flops'] / full - 1:+.1%}",
            f"{row['peak'] / GIB:.2f} GiB" if "peak" in row else "",
            f"{row['seconds']:.0f} s" if "seconds" in row else "",
        )
        for variant, row in results.items()
    ]
    header = ("variant", "experts", "parameters", "published", "on disk")
    header += ("beyond parameters × dtype", "FLOPs", "peak memory", "time")
    show("switch-base-32 (random weights, bfloat16)", header, rows)
    if not options.quick:
        save("identities", {"machine": machine(), **results})


if __name__ == "__main__":
    main()
