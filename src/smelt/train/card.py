"""The model card of a trained folder."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from smelt.checkpoint.card import card


def training_card(name: str, model: PreTrainedModel, result: Mapping[str, Any]) -> str:
    """What was trained, and what it reached, from what `training.json` holds."""
    rows = [
        f"| {text} | {one['nats_per_token']:.4f} | {one['predicted_tokens']:,} |"
        for text, one in result["held_out"].items()
    ]
    family = model.config.model_type
    table = ["| held-out text | nats per token | tokens |", "|---|---:|---:|", *rows]
    what = (
        f"A `{family}` of {result['parameters']:,} parameters, trained by `smelt train` in "
        f"{result['steps']:,} steps on {result['tokens_trained']:,} tokens."
    )
    text = [
        f"# {name}",
        what,
        "\n".join(table) if rows else "",
        "Load it with `import smelt` and transformers' Auto classes."
        if family == "samoe"
        else "Load it with transformers' Auto classes.",
        "Every setting is in `smelt/recipe.yaml`, what was reached in `smelt/training.json`.",
    ]
    return card("\n\n".join(filter(None, text)), [family])
