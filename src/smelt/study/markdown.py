"""The results of a study as text for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from smelt.evaluate.results import markdown

LISTED = (2, 3, 5, 10, 20)
"""Of the numbers of seeds, those that are shown."""


def report(found: Mapping[str, Any]) -> str:
    """Every table that has something in it, with a line on how to read it."""
    parts = [
        _section("Rows", _rows(found["rows"]), ROWS),
        _section("Differences at equal seeds", _differences(found["differences"]), DIFFERENCES),
        _section("What the seeds resolve", _power(found), POWER),
        _section("Loss against size", _fits(found["fits"]), FITS),
        *(
            _section(f"At equal {name}", _matched(name, rows), MATCHED)
            for name, rows in found["matched"].items()
        ),
        _section("Fine-tuned", _finetune(found["finetune"]), FINETUNE),
        _section("Learning rates", _rates(found["learning_rates"]), RATES),
        _unfinished(found["unfinished"]),
    ]
    return "\n".join(part for part in parts if part)


ROWS = (
    "Loss: nats per token, mean over the held-out texts, mean ± sd over seeds; then the sd over "
    "the last checkpoints of a run (the learning rate still falls between them). FLOPs: of a "
    "forward, mid-sequence. Tasks: zero-shot, ± standard error over items. Training tokens/s as it "
    "ran, with whatever ran beside it. Decode: ms a step."
)
DIFFERENCES = "Nats, less the row named; negative is better. The interval is Student's, 95 %."
POWER = (
    "The smallest effect in nats that a two-sided test at 5 % finds with 80 % power, by seeds of "
    "each variant."
)
FITS = (
    "nats = floor + scale · (parameters / middle)^−exponent; and log nats on the logs of width and "
    "experts. ± standard error; rms of the residuals. Residuals are in tables.json. Not "
    "determined: scale or exponent less than two standard errors from 0; the loss may be flat."
)
MATCHED = (
    "Picked: a row within 2 %. Interpolated: linearly in log cost between neighbours on the other "
    "variant's frontier. Same text and training tokens throughout; nothing is extrapolated."
)
FINETUNE = "± sd over pre-training seeds, [standard error over items]. No checkpoint is picked."
RATES = "Held-out nats of every trial, and the rate taken."


def _section(title: str, rows: Sequence[Mapping[str, Any]], note: str) -> str:
    return f"### {title}\n\n{note}\n\n{markdown(rows)}" if rows else ""


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for row in rows:
        one: dict[str, Any] = {
            "row": row["row"],
            "seeds": f"{len(row['seeds'])}/{row['seeds_asked']}",
            "parameters": row["parameters"],
            "active": row["active_parameters"],
            "FLOPs/token": row["flops_per_token"],
            "tokens": row["tokens"],
            "nats": _with_sd(row["nats"]),
            "sd of last": _fixed(row["nats_sd_of_last_checkpoints"]),
        }
        for task, score in row["tasks"].items():
            chance = "" if score["chance"] is None else f" (chance {score['chance']:.3g})"
            one[f"{task} {score['metric']}{chance}"] = _with_error(
                score["mean"], score["standard_error"]
            )
        one["tokens/s"] = round(row["training_tokens_per_second"])
        one["peak MB"] = round(row["peak_memory_bytes"] / 1e6)
        for batch, milliseconds in sorted(row["decode_milliseconds"].items()):
            one[f"ms, batch {batch}"] = milliseconds
        shown.append(one)
    return shown


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "row": one["row"],
            "less": one["less"],
            "seeds": one["n"],
            "difference": _signed(one["mean"]),
            "95 % interval": None
            if one["low"] is None
            else f"{_signed(one['low'])} … {_signed(one['high'])}",
            "p": None if one["p"] is None else f"{one['p']:.2g}",
        }
        for one in rows
    ]


def _power(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    power, noise = found["power"], found["noise"]
    if power is None:
        return []
    shown = []
    for kind, of in (("unpaired", "run"), ("paired", "difference")):
        if kind not in power["smallest_effect"]:
            continue
        sd = noise[of]
        one = {
            "test": kind,
            "sd": f"{sd['sd']:.4f} ({sd['low']:.4f} … {sd['high']:.4f})",
        }
        for n in LISTED:
            one[f"{n} seeds"] = f"{power['smallest_effect'][kind][n]:.4f}"
        for effect in power["effects"]:
            key = f"seeds_{kind}"
            low, high = effect[f"{key}_at_least"], effect[f"{key}_at_most"]
            column = f"seeds for {effect['effect']} ({effect['nats']:g})"
            one[column] = f"{effect[key]:,} ({low:,} … {high:,})"
        shown.append(one)
    return shown


def _fits(fits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for fit in fits:
        law, plane = fit["by_parameters"], fit["by_width_and_experts"]
        one = {
            "part": fit["part"],
            "variant": fit["variant"],
            "text": ", ".join(fit["text"]),
            "points": len(fit["rows"]),
        }
        if law is not None:
            errors = law["errors"] or (None, None, None)
            is_found = law["is_determined"]
            one["floor"] = _with_error(law["floor"], errors[0]) if is_found else "not determined"
            one["scale"] = _with_error(law["scale"], errors[1]) if is_found else None
            one["middle"] = round(law["middle"])
            one["exponent"] = _with_error(law["exponent"], errors[2])
            one["rms"] = _fixed(law["rms"])
        if plane is not None:
            for name, slope, error in zip(
                ("width", "experts"), plane["slopes"], plane["errors"], strict=True
            ):
                one[f"slope {name}"] = _with_error(slope, error)
            one["rms of plane"] = _fixed(plane["rms"])
        shown.append(one)
    return shown


def _matched(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per comparison; those that nothing spans share one for each row, behind the others."""
    shown: dict[str, list[dict[str, Any]]] = {}
    unspanned: dict[str, list[Mapping[str, Any]]] = {}
    for one in rows:
        lines = shown.setdefault(one["row"], [])
        if one["difference"] is None:
            unspanned.setdefault(one["row"], []).append(one)
        else:
            error = one["standard_error"]
            difference = _signed(one["difference"]) + ("" if error is None else f" ± {error:.4f}")
            how = f"{one['how']}: {', '.join(one['taken_from'])}"
            lines.append(_beside(name, one, one["beside"], one["nats_beside"], how, difference))
    for row, lacking in unspanned.items():
        beside = ", ".join(one["beside"] for one in lacking)
        shown[row].append(_beside(name, lacking[0], beside, None, "not spanned", None))
    return [line for lines in shown.values() for line in lines]


def _beside(
    name: str,
    one: Mapping[str, Any],
    beside: str,
    nats: float | None,
    how: str,
    difference: str | None,
) -> dict[str, Any]:
    return {
        "row": one["row"],
        name: round(one["cost"]) if one["cost"] > 1000 else one["cost"],
        "nats": _fixed(one["nats"]),
        "beside": beside,
        "its nats": _fixed(nats),
        "how": how,
        "difference": difference,
    }


def _finetune(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "row": one["row"],
            "task": one["task"],
            "runs": one["runs"],
            "accuracy": f"{_with_sd(one['accuracy'])} [{one['standard_error']:.4f}]",
            "F1": _with_sd(one["f1"]),
            "n": one["n"],
            "chance": one["chance"],
            "commonest class": one["majority"],
        }
        for one in rows
    ]


def _rates(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "search": one["search"],
            **{rate: _fixed(nats) for rate, nats in one["nats"].items()},
            "taken": one["chosen"],
        }
        for one in rows
        if any(nats is not None for nats in one["nats"].values())
    ]


def _unfinished(states: Mapping[str, str]) -> str:
    if not states:
        return "Every cell is finished.\n"
    lines = "\n".join(f"- {name}: {state}" for name, state in states.items())
    return f"### Unfinished: {len(states)} cells\n\n{lines}\n"


def _with_sd(found: Mapping[str, Any]) -> str:
    return _with_error(found["mean"], found["sd"])


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _fixed(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
