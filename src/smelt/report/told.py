"""What was done, told from recipe, plan and records, in sentences and tables."""

from collections.abc import Sequence
from statistics import fmean

from smelt.compress.plan import LayerPlan, Plan
from smelt.report.blocks import Block, Section, Table, Text, count, join, plural, size, slug
from smelt.report.runs import Run

_OPERATORS = {
    "merge": "Experts that are alike were merged into one of them",
    "drop": "The experts that matter least were dropped",
    "constant": "The experts that matter least gave way to their mean output, a constant vector",
}
_FORMS = {
    "stock": "an ordinary checkpoint of its family, whose router chooses among fewer experts",
    "mapped": "the mapped form: the router keeps all its rows, and a map says which stored expert "
    "serves each of them",
    "expanded": "the expanded form: every slot holds the merged expert of its group, so nothing is "
    "saved, and third parties can evaluate it",
}


def done(runs: Sequence[Run]) -> Section:
    """What was done, run by run."""
    parts = tuple(
        Section(f"done-{slug(run.name)}", run.name, tuple(_blocks(run)))
        for run in runs
        if run.plan is not None or run.training or run.healing or run.kind == "exported"
    )
    return Section("done", "What was done", parts=parts)


def _blocks(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if run.plan is not None:
        blocks += [Text(" ".join(_sentences(run, run.plan))), _choices(run.plan)]
        blocks.append(_layers(run.plan))
    if run.healing:
        blocks += _healing(run)
    elif run.training:
        blocks += _training(run)
    if run.kind == "exported":
        export = run.provenance["export"]
        blocks.append(Text(f"Frozen from the SaMoE checkpoint {run.source} into {export['to']}."))
    return blocks


def _sentences(run: Run, plan: Plan) -> list[str]:
    before, after = (
        [getattr(layer, n) for layer in plan.layers] for n in ("num_experts", "num_groups")
    )
    method, p = plan.method, plan.predicted
    each = str(after[0]) if len(set(after)) == 1 else f"{min(after)} to {max(after)}"
    verb = "is to be" if run.kind == "plan" else "was"
    how = _OPERATORS.get(method.operator, "Experts were replaced")
    first = (
        f"{run.source[:1].upper()}{run.source[1:]} {verb} compressed by the method "
        f"{plan.recipe.method}: {each} of {max(before)} experts are left in each of "
        f"{plural(len(before), 'MoE layer')} ({fmean(after):.1f} on average)."
    )
    words = [first, f"{how}; what counts is the score {method.score}."]
    if method.operator == "merge":
        words.append(
            f"Groups were formed by {method.similarity} ({method.grouping}), hidden units aligned "
            f"by {method.align}, and members weighted by {method.weights}."
        )
    kept = [layer for layer in plan.layers if layer.operator == "keep"]
    if kept:
        words.append(f"{plural(len(kept), 'layer')} stayed as they were.")
    if plan.recipe.reconstruct is not None:
        words.append("What is left of each layer was then fitted to what the whole layer did.")
    if plan.recipe.decompose is not None:
        words.append("The experts that are left are stored as low rank and a few whole rows.")
    words.append(f"The result is {_FORMS[plan.form]}.")
    share = p.bytes_after / p.bytes_before
    words.append(
        f"By the plan, tensors take {size(p.bytes_after)} instead of {size(p.bytes_before)} "
        f"({share:.0%}) and hold {count(p.params_after)} parameters instead of "
        f"{count(p.params_before)}."
    )
    return words


def _choices(plan: Plan) -> Table:
    """The coordinates of the method, and what the recipe says beside them."""
    method, recipe = plan.method, plan.recipe
    text = recipe.calibration
    rows = [
        ("method", recipe.method),
        ("form", plan.form),
        ("operator", method.operator),
        ("score", method.score),
        ("budget", method.budget),
    ]
    if method.operator == "merge":
        rows += [
            ("similarity", method.similarity),
            ("grouping", method.grouping),
            ("alignment of hidden units", method.align),
            ("merge weights", method.weights),
            ("merge rule", method.rule + (", repaired" if method.repair else "")),
        ]
    rows += [("router rows", method.router)] if plan.form == "stock" else []
    rows.append(("sequential", "yes" if method.sequential else "no, one shot"))
    named = f"task {text.task.name}" if text.task is not None else join(text.text)
    rows.append(("calibrated on", f"{named}, {text.num_tokens:,} tokens at most"))
    rows.append(("seed", str(recipe.seed)))
    return Table("The choices of the recipe", ("choice", "value"), tuple(rows))


def _layers(plan: Plan) -> Table:
    """A row per layer."""
    rows = []
    for layer in plan.layers:
        sizes = group_sizes(layer)
        alike = member_similarities(layer)
        rows.append(
            {
                "layer": layer.name,
                "operator": layer.operator,
                "experts": layer.num_experts,
                "kept": layer.num_groups,
                "largest group": max(sizes) if layer.operator == "merge" else None,
                "mean similarity of members": fmean(alike) if alike else None,
                "kB before": round(layer.bytes_before / 1e3),
                "kB after": round(layer.bytes_after / 1e3),
            }
        )
    return Table.of("The plan, layer by layer", rows)


def group_sizes(layer: LayerPlan) -> list[int]:
    """Members of each group, its dominant too."""
    sizes = [0] * layer.num_groups
    for group in layer.labels:
        if group >= 0:
            sizes[group] += 1
    return sizes


def member_similarities(layer: LayerPlan) -> list[float]:
    """How alike the merged experts are to the dominant they joined."""
    if layer.operator != "merge":
        return []
    pairs = zip(layer.labels, layer.similarity, strict=True)
    dominants = set(layer.dominants)
    return [s for e, (group, s) in enumerate(pairs) if group >= 0 and e not in dominants]


def _healing(run: Run) -> list[Block]:
    healing = run.healing
    teacher = healing.get("teacher", {}).get("name", "its teacher")
    words = (
        f"Healed towards {teacher} by smelt heal: {healing.get('steps', 0):,} steps, "
        f"{healing.get('tokens_trained', 0):,} tokens."
    )
    before, after = healing.get("before") or {}, healing.get("after") or {}
    rows = [
        {
            "held-out text": text,
            "nats before": old.get("nats_per_token"),
            "nats after": after.get(text, {}).get("nats_per_token"),
            "KL to the teacher before": old.get("kl_to_teacher"),
            "KL after": after.get(text, {}).get("kl_to_teacher"),
        }
        for text, old in before.items()
    ]
    return [Text(words), *([Table.of("What healing did, on held-out text", rows)] if rows else [])]


def _training(run: Run) -> list[Block]:
    training = run.training
    words = (
        f"Trained by smelt train: {training.get('parameters', 0):,} parameters, "
        f"{training.get('steps', 0):,} steps, {training.get('tokens_trained', 0):,} tokens in "
        f"{training.get('seconds') or 0:,.0f} s."
    )
    rows = [
        {
            "held-out text": text,
            "nats per token": one.get("nats_per_token"),
            "bits per byte": one.get("bits_per_byte"),
            "of a unigram's nats": one.get("share_of_unigram"),
            "tokens": one.get("predicted_tokens"),
        }
        for text, one in (training.get("held_out") or {}).items()
        if isinstance(one, dict)
    ]
    table = Table.of("Loss at the end, on held-out text", rows) if rows else None
    return [Text(words), *([table] if table else [])]
