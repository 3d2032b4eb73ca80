"""The page: what was analysed, the figures with a sentence each, the numbers of every variant."""

from collections.abc import Sequence
from typing import Any

import jinja2

from smelt.analyse.drawing import Drawn
from smelt.analyse.figures import short

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>smelt analyse</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 0.2rem; }
p { margin: 0.3rem 0 0.8rem; }
.small { color: #555; font-size: 0.87rem; }
.scroll { overflow-x: auto; }
figure { margin: 0.6rem 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.87rem; }
th, td { padding: 0.2rem 0.7rem 0.2rem 0; text-align: right; border-bottom: 1px solid #e4e4e4;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
nav a { margin-right: 0.9rem; white-space: nowrap; }
</style>
</head>
<body>
<h1>smelt analyse</h1>
<p class="small">{{ runs|length }} run{{ "s" if runs|length > 1 }} of {{ table|length }}
variant{{ "s" if table|length > 1 }}.{% if ground %} Gradients and similarities on
{{ ground.micro_batches }} micro-batches of {{ ground.sequences_per_micro_batch }} ×
{{ ground.sequence_length }} tokens of {{ ground.text|join(", ") }}.{% if differ %}
Not all runs saw the same tokens: their texts, tokenizers or lengths differ.{% endif %}{% endif %}
Every number is in <code>analysis.json</code>; docs/analysis.md has the formulas.</p>
<nav class="small">{% for one in figures %}<a href="#{{ one.name }}">{{ one.title }}</a>
{% endfor %}</nav>
<h2>Variants</h2>
<p class="small">Mean ± standard deviation over runs. Signal-to-noise is that of one micro-batch, of
the experts as they are stored.</p>
<div class="scroll"><table>
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table %}<tr>{% for name in columns %}<td>{{ row[name] }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% for one in figures %}
<h2 id="{{ one.name }}">{{ one.title }}</h2>
<p>{{ one.sentence }}</p>
<figure>{{ one.svg|safe }}</figure>
{% endfor %}
{% if left_out %}
<h2>Left out</h2>
<ul class="small">{% for line in left_out %}<li>{{ line }}</li>{% endfor %}</ul>
{% endif %}
</body>
</html>
"""


def page(value: dict[str, Any], figures: Sequence[Drawn]) -> str:
    """The page as HTML that needs no other file."""
    rows = table(value)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    grounds = [run["ground"] for run in value["runs"] if run["ground"]]
    return environment.from_string(TEMPLATE).render(
        runs=value["runs"],
        ground=grounds[0] if grounds else None,
        differ=len({one["text_sha256"] for one in grounds}) > 1,
        figures=figures,
        columns=list(rows[0]),
        table=rows,
        left_out=left_out(value),
    )


def table(value: dict[str, Any]) -> list[dict[str, str]]:
    """The main numbers of every variant, as words; columns that nobody fills are left out."""
    rows = [_row(one) for one in value["variants"]]
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    filled = [name for name in names if any(row.get(name) for row in rows)]
    return [{name: row.get(name, "") for name in filled} for row in rows]


def left_out(value: dict[str, Any]) -> list[str]:
    """What could not be done, run by run."""
    return [f"{run['run']}: {reason}" for run in value["runs"] for reason in run["left_out"]]


def _row(variant: dict[str, Any]) -> dict[str, str]:
    gradients, mixing = variant["gradients"] or {}, variant["mixing"] or {}
    stored = gradients.get("per_stored_expert") or {}
    row = {"variant": variant["variant"], "runs": str(len(variant["runs"]))}
    for source, curve in variant["curves"].get("held_out", {}).items():
        last = {"mean": curve["mean"][-1], "sd": curve["sd"][-1]}
        row[f"last held-out nats, {short(source)}"] = _spelt(last, 4)
    return row | {
        "loss here, nats + balance": _spelt(gradients.get("loss"), 4),
        "expert gradient norm": _spelt(stored.get("norm")),
        "expert SNR": _spelt(stored.get("snr")),
        "tokens per expert": _spelt(stored.get("tokens")),
        "alignment of layers": _spelt(gradients.get("alignment")),
        "effective rank of α": _spelt(mixing.get("effective_rank")),
        "distance from one-hot": _spelt(_overall(mixing.get("distance_from_one_hot"))),
    }


def _overall(spreads: list[dict[str, Any] | None] | None) -> dict[str, Any] | None:
    known = [one["mean"] for one in spreads or () if one]
    return {"mean": sum(known) / len(known), "sd": None} if known else None


def _spelt(spread: dict[str, Any] | None, digits: int = 3) -> str:
    if spread is None:
        return ""
    text = _number(spread["mean"], digits)
    return text if spread["sd"] is None else f"{text} ± {_number(spread['sd'], 1)}"


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
