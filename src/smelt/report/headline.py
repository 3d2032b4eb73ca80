"""The numbers a reader sees first: what a run saved, and what that cost."""

from collections.abc import Mapping, Sequence

from smelt.report.blocks import Card, Cards, count, size, with_error
from smelt.report.costs import Costs
from smelt.report.draw_costs import cost_words
from smelt.report.quality import Measure
from smelt.report.runs import Run

_FIRST = ("bits per byte", "nats per token")
_SMALL = ("acc", "logit KL", "perplexity", "top-1 agreement")


def headline(run: Run, found: Sequence[Measure], costs: Costs) -> Cards | None:
    """At most eight numbers of one run, beside its original's where that is known."""
    cards = [*_sizes(run, costs), *_quality(run, found), *_times(run, costs)]
    return Cards(run.name, tuple(cards[:8])) if cards else None


def _sizes(run: Run, costs: Costs) -> list[Card]:
    plan = run.plan
    if plan is None:
        cards = []
        if run.num_bytes:
            cards.append(Card("weights on disk", size(run.num_bytes)))
        if run.training.get("parameters"):
            cards.append(Card("parameters", count(run.training["parameters"])))
        if run.training.get("tokens_trained"):
            cards.append(Card("tokens trained on", count(run.training["tokens_trained"])))
        return cards + _held_out(run)
    p = plan.predicted
    experts = [layer.num_experts for layer in plan.layers], [x.num_groups for x in plan.layers]
    before, after = (f"{sum(n) / len(n):.3g}" for n in experts)
    share = sum(experts[1]) / sum(experts[0])
    num_bytes = run.num_bytes or p.bytes_after
    note = "by the plan" if run.num_bytes is None else "weights on disk"
    original = costs.by_key["bytes"].get(plan.checkpoint, p.bytes_before)
    return [
        Card("experts per layer", after, before, f"{share:.0%} are left"),
        Card("bytes", size(num_bytes), size(original), f"{num_bytes / original:.0%}, {note}"),
        Card(
            "parameters",
            count(p.params_after),
            count(p.params_before),
            f"{p.params_after / p.params_before:.0%}",
        ),
        Card(
            "FLOPs of the MoE layers",
            count(p.moe_flops_per_token_after),
            count(p.moe_flops_per_token_before),
            "per token, by the plan",
        ),
    ]


def _held_out(run: Run) -> list[Card]:
    held = run.training.get("held_out") or {}
    values = [one["nats_per_token"] for one in held.values() if "nats_per_token" in one]
    if not values:
        return []
    mean = sum(values) / len(values)
    return [Card("held-out loss", f"{mean:.3f}", None, f"nats per token, {len(values)} texts")]


def _quality(run: Run, found: Sequence[Measure]) -> list[Card]:
    if run.fingerprint is None:
        return []
    original = run.plan.checkpoint if run.plan is not None else None
    own = [one for one in found if run.fingerprint in one.results]
    losses = [one for name in _FIRST for one in own if one.metric == name][:1]
    others = [one for one in own if one.metric in _SMALL and one.metric != "perplexity"]
    cards = []
    for one in [*losses, *others[:3]]:
        result = one.results[run.fingerprint]
        before = one.results.get(original) if original is not None else None
        value, _, error = with_error(result.value, result.standard_error).partition(" ± ")
        words = [f"± {error}"] if error else []
        words += [] if one.chance is None else [f"chance {one.chance:.2g}"]
        old = None
        if before is not None:
            old = with_error(before.value, before.standard_error).partition(" ± ")[0]
        cards.append(Card(one.name, value, old, ", ".join([*words, f"n = {one.n:,}"])))
    return cards


def _times(run: Run, costs: Costs) -> list[Card]:
    fingerprint = run.fingerprint
    cards = []
    names: Mapping[str, str] = {"decode": "decode step", "memory": "peak memory"}
    for key, name in names.items():
        held = costs.by_key[key]
        if fingerprint is not None and fingerprint in held:
            original = held.get(run.plan.checkpoint) if run.plan is not None else None
            note = ""
            if key == "decode" and costs.decode_at is not None:
                note = f"batch {costs.decode_at[0]}, context {costs.decode_at[1]}"
            before = None if original is None else cost_words(key, original)
            cards.append(Card(name, cost_words(key, held[fingerprint]), before, note))
    return cards


def row_of(cards: Cards) -> dict[str, str]:
    """The numbers as one row of a table of several runs."""
    values = {
        card.name: card.value if card.before is None else f"{card.before} → {card.value}"
        for card in cards.cards
    }
    return {"run": cards.name, **values}
