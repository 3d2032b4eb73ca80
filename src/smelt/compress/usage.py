"""How often each expert was chosen on the calibration text: a small file beside the plan.

The statistics themselves are large and are not kept with a compressed checkpoint; what a reader
wants to see of them is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smelt.compress.calibrate import RoutingStats
from smelt.errors import CheckpointError
from smelt.routing import LayerStats

FILE = "smelt/usage.json"
VERSION = 1


@dataclass(frozen=True)
class Usage:
    """Per layer and expert: choices, and what the chosen ones added to the stream."""

    num_tokens: int
    text: str  # hash of the text
    count: Mapping[str, tuple[int, ...]]  # by layer: choices of each expert
    saliency: Mapping[str, tuple[float, ...]]  # Σ gate · ‖output‖ over its tokens


def usage_of(stats: RoutingStats) -> Usage:
    """What statistics say of usage."""
    return Usage(
        stats.num_tokens,
        stats.text,
        {name: tuple(layer.count.tolist()) for name, layer in stats.layers.items()},
        {name: _rounded(layer) for name, layer in stats.layers.items()},
    )


def _rounded(layer: LayerStats) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in layer.saliency.tolist())


def usage_json(stats: RoutingStats) -> str:
    """The text of `smelt/usage.json`."""
    found = usage_of(stats)
    layers = {
        name: {"count": list(count), "saliency": list(found.saliency[name])}
        for name, count in found.count.items()
    }
    value: dict[str, Any] = {"version": VERSION, "num_tokens": found.num_tokens, "text": found.text}
    return json.dumps(value | {"layers": layers}) + "\n"


def read_usage(path: Path) -> Usage:
    """The usage of a file.

    Raises:
        CheckpointError: it is none, or was edited.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["version"] != VERSION:
            raise ValueError(f"version {value['version']}")
        layers = value["layers"].items()
        return Usage(
            int(value["num_tokens"]),
            str(value["text"]),
            {name: tuple(int(n) for n in one["count"]) for name, one in layers},
            {name: tuple(float(s) for s in one["saliency"]) for name, one in layers},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as the usage of experts ({error}). Remove the file, or "
            "compress again."
        ) from None
