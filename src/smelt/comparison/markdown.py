"""The results of a comparison as text for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from smelt.evaluate.results import markdown

READING = (
    "Mean ± sd over seeds. Differences are row less full and row less the focus, with a paired "
    "95 % interval over seeds and items (crossed bootstrap, docs/comparison.md; of one seed: over "
    "items alone). Parameters and bytes are of what lies on disk. FLOPs: counted, of a forward, "
    "per token (of an encoder–decoder: one read and one written together)."
)


def report(found: Mapping[str, Any]) -> str:
    """Every table that has something in it, with a line on how to read it."""
    tables = [_table(one) for one in found["tables"]]
    rates = markdown(_rates(found["learning_rates"]))
    parts = [
        READING + "\n" if tables else "",
        *tables,
        f"### Learning rates of healing\n\nLoss of every trial on items that are for choosing "
        f"(less is better), and the rate taken.\n\n{rates}"
        if rates
        else "",
        _unfinished(found["unfinished"]),
    ]
    return "\n".join(part for part in parts if part)


def _table(table: Mapping[str, Any]) -> str:
    levels = "; ".join(
        f"{metric}: " + ", ".join(f"{rule} {_fixed(value)}" for rule, value in rules.items())
        for metric, rules in table["without_a_model"].items()
        if rules
    )
    lines = [f"### {table['part']}: {table['ground']}", "", f"{table['items']}."]
    if levels:
        lines.append(f"Without a model: {levels}.")
    lines += [
        *_gate(table),
        _groups(table),
        "",
        markdown([_row(row, table["focus"]) for row in table["rows"]]),
    ]
    return "\n".join(lines)


def _gate(table: Mapping[str, Any]) -> list[str]:
    """Whether the full model has learnt what its compressed relatives are to keep."""
    gate = table["gate"]
    if gate is None:
        return []
    errors = gate["standard_errors"]
    if errors is None:
        above = f"{_signed(gate['above'])}, of no known standard error,"
    else:
        above = f"{_signed(round(errors, 1)).rstrip('0').rstrip('.')} standard errors"
    said = (
        f"full stands {above} from the best rule without a model "
        f"({gate['metric']}: {gate['rule']}, {_fixed(gate['level'])})."
    )
    if gate["is_passed"]:
        return [said]
    return [f"**{said} It has not learnt this: the rows say little.**"]


def _groups(table: Mapping[str, Any]) -> str:
    """What is known about groups and budgets, other groups first."""
    states = {name: state for name, state in table["groups"].items() if state is not None}
    if not states:
        return "Groups: no row is compressed as the focus is."
    if table["other_groups"]:
        other = ", ".join(f"{name} ({states[name]})" for name in table["other_groups"])
        return f"**Not the groups of {table['focus']}: {other}.**"
    by: dict[str, list[str]] = {}
    for name, state in states.items():
        by.setdefault(state, []).append(name)
    said = "; ".join(f"{state}: {', '.join(names)}" for state, names in by.items())
    return f"Plans held against {table['focus']}: {said}."


def _row(row: Mapping[str, Any], focus: str) -> dict[str, Any]:
    one: dict[str, Any] = {
        "row": row["row"],
        "seeds": f"{len(row['seeds'])}/{row['seeds_asked']}",
    }
    for place, (metric, found) in enumerate(row["metrics"].items()):
        sd = "" if found["sd"] is None else f" ± {_fixed(found['sd'])}"
        one[metric] = _fixed(found["mean"]) + sd
        if place == 0 or metric.startswith("nats"):
            one[f"{metric} less full"] = _difference(found["less_full"])
            one[f"{metric} less {focus}"] = _difference(found["less_focus"])
    costs = row["costs"]
    one["experts"] = round(costs["experts"])
    one["parameters"] = round(costs["parameters"])
    one["not zero"] = round(costs["nonzero_parameters"])
    one["of experts"] = round(costs["parameters_of_experts"])
    one["MB on disk"] = round(costs["bytes"] / 1e6, 3)
    one["MoE FLOPs"] = round(costs["moe_flops_per_token"])
    one["FLOPs"] = round(costs["flops_per_token"])
    one |= row["latency"] or {}
    rates = [f"{rate:g}" for rate in row["learning_rates"] if rate]
    one["healing rate"] = ", ".join(rates) or None
    one["steps"] = max(row["healing_steps"], default=None)
    return one


def _rates(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "ground": one["ground"],
            "variant": one["variant"],
            **{rate: None if loss is None else _fixed(loss) for rate, loss in one["loss"].items()},
            "taken": one["chosen"],
        }
        for one in rows
        if any(loss is not None for loss in one["loss"].values())
    ]


def _unfinished(states: Mapping[str, str]) -> str:
    if not states:
        return "Every cell is finished.\n"
    lines = "\n".join(f"- {name}: {state}" for name, state in states.items())
    return f"### Unfinished: {len(states)} cells\n\n{lines}\n"


def _difference(found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return None
    text = _signed(found["mean"])
    if found["low"] is None:
        return text
    return f"{text} [{_signed(found['low'])} … {_signed(found['high'])}]"


def _fixed(value: float) -> str:
    return f"{value:.4f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
