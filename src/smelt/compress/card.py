"""The README of an output folder: what was done to which checkpoint, and what that changed."""

from jinja2 import Environment

from smelt.checkpoint.card import base_model, card
from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import RoutingStats
from smelt.compress.plan import Plan
from smelt.compress.usage import FILE as USAGE
from smelt.compress.usage import usage_json

_TAGS = {"merge": "expert-merging", "drop": "expert-pruning", "constant": "expert-pruning"}

_TEMPLATE = """\
# {{ name }}, compressed by smelt

| | before | after |
|---|---:|---:|
{% for name, before, after in rows -%}
| {{ name }} | {{ before }} | {{ after }} |
{% endfor %}
Method `{{ plan.recipe.method }}` in the {{ plan.form }} form: {{ method }}.
Calibrated on {{ "{:,}".format(stats.num_tokens) }} tokens (text hash `{{ stats.text[:12] }}`).
{% if fit %}
{{ fit }}
{% endif %}
{{ loading }}

What was decided for each expert is in `smelt/plan.json`, where it came from in
`smelt/provenance.json`.
"""

_LOADING = {
    "stock": "This is an ordinary checkpoint of its family: load it as you load the original.",
    "expanded": "This checkpoint has the original's size, every merged expert written out in each "
    "of its members' slots. It is for evaluation by third parties only.",
    "mapped": "Load it with `import smelt` and transformers' Auto classes, or without smelt "
    "through the modelling file beside the weights: "
    "`from_pretrained(folder, trust_remote_code=True)`.",
}


def _rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Name, before, after."""
    p, count = plan.predicted, len(plan.layers)
    before = sum(layer.num_experts for layer in plan.layers) / count
    after = sum(layer.num_groups for layer in plan.layers) / count
    flops = p.moe_flops_per_token_before, p.moe_flops_per_token_after
    return [
        ("experts per layer (mean)", f"{before:.1f}", f"{after:.1f}"),
        ("parameters", f"{p.params_before:,}", f"{p.params_after:,}"),
        ("tensor bytes", f"{p.bytes_before:,}", f"{p.bytes_after:,}"),
        ("MoE FLOPs per token", f"{flops[0]:,}", f"{flops[1]:,}"),
    ]


def _fit(plan: Plan) -> str:
    recipe = plan.recipe.reconstruct
    if recipe is None:
        return ""
    parts = [n for n in ("experts", "router") if getattr(recipe, n)]
    target = recipe.target or ("layer" if recipe.inputs == "sample" else "corrected")
    return (
        f"What is kept of each layer ({' and '.join(parts)}) was fitted to what the layer did on "
        f"that text, target `{target}`; errors before and after are in the plan."
    )


def documents(
    checkpoint: Checkpoint, plan: Plan, stats: RoutingStats | None = None
) -> dict[str, str]:
    """What lies beside the weights for a reader: card and usage, where statistics are at hand."""
    if stats is None:
        return {}
    return {"README.md": model_card(checkpoint, plan, stats), USAGE: usage_json(stats)}


def model_card(checkpoint: Checkpoint, plan: Plan, stats: RoutingStats) -> str:
    """The model card as Markdown."""
    method = plan.method
    words = [f"operator {method.operator}", f"score {method.score}", f"budget {method.budget}"]
    if method.operator == "merge":
        words += [f"groups by {method.similarity}", f"alignment {method.align}"]
        words += [f"merge weights {method.weights}", f"rule {method.rule}"]
        words += ["repaired"] if method.repair else []
    if plan.form == "stock":
        words.append(f"router rows {method.router}")
    template = Environment(autoescape=False, keep_trailing_newline=True).from_string(_TEMPLATE)
    name = base_model(checkpoint)
    text = template.render(
        name=name.rpartition("/")[2],
        rows=_rows(plan),
        plan=plan,
        method=", ".join(words),
        stats=stats,
        fit=_fit(plan),
        loading=_LOADING[plan.form],
    )
    return card(text, [_TAGS.get(method.operator, "compressed")], checkpoint)
