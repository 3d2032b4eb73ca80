"""What `compress` and `apply` say of what they made."""

import json
from pathlib import Path
from typing import Any

from smelt.cli.screen import Screen, counts, disk_bytes, number, size
from smelt.errors import PlanError


def report_made(screen: Screen, source: str, folder: Path, shown: str) -> None:
    """What was done, by the plan in the new folder."""
    try:
        done = json.loads((folder / "smelt" / "plan.json").read_text(encoding="utf-8"))
        text = (folder / "smelt" / "provenance.json").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PlanError(f"{folder}: its plan cannot be read ({error}).") from None
    predicted, layers = done["predicted"], done["layers"]
    value: dict[str, Any] = {
        "output": str(folder),
        "form": done["form"],
        "method": done["recipe"]["method"],
        "operator": done["method"]["operator"],
        "experts_before": [layer["num_experts"] for layer in layers],
        "experts_after": [layer["num_groups"] for layer in layers],
        **{key: predicted[key] for key in ("params_before", "params_after")},
        **{key: predicted[key] for key in ("bytes_before", "bytes_after")},
        "bytes_on_disk": disk_bytes(folder),
        "fits": {layer["name"]: layer["fit"] for layer in layers if layer.get("fit")},
        "dropped": json.loads(text).get("dropped", []),
        "seconds": screen.seconds,
    }
    screen.result(value, _words(value, source, shown))


def _words(value: dict[str, Any], source: str, folder: str) -> str:
    verb = "merged into" if value["operator"] == "merge" else "kept"
    before, after = value["bytes_before"], value["bytes_after"]
    experts = (
        f"{counts(value['experts_before'])} experts in each of {len(value['experts_before'])} "
        f"layers, {verb} {counts(value['experts_after'])}"
    )
    sizes = (
        f"{size(before)} → {size(after)} of weights ({after / before:.0%}), "
        f"{number(value['params_before'])} → {number(value['params_after'])} parameters, "
        f"in {value['seconds']} s"
    )
    fits = value["fits"].values()
    if fits:
        before, after = (sum(fit[k] for fit in fits) / len(fits) for k in ("before", "after"))
        sizes += (
            f"\n{len(fits)} layers fitted: error of a layer's output on held-out tokens "
            f"{before:.3f} → {after:.3f} (mean)"
        )
    lines = [f"{experts} ({value['method']}, {value['form']} form)", sizes, f"Written to {folder}"]
    if value["dropped"]:
        lines.append(f"Left out: {len(value['dropped'])} tensors of multi-token-prediction layers")
    lines += [
        "",
        f"Next:  smelt evaluate {source} {folder} --original {source}",
        f"       smelt inspect {folder}",
    ]
    return "\n".join(lines)
