"""Model cards: their metadata as the hub reads it, and the part that measurements fill in."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from smelt.checkpoint.source import Checkpoint

BEGIN, END = "<!-- smelt: measured -->", "<!-- smelt: end of measured -->"
"""Around the part of a card that `smelt report --card` fills in."""

NOT_MEASURED = f"""\
## Measured

{BEGIN}
The quality was not measured yet. `smelt evaluate FOLDER -o results.json` measures it, and
`smelt report FOLDER --results results.json --card` writes it here.
{END}
"""

_TAKEN_OVER = ("license", "license_name", "license_link", "language")
"""What the metadata of a source's card holds for what is made of it too."""


def card(text: str, tags: Sequence[str], source: Checkpoint | None = None) -> str:
    """A model card as Markdown.

    Args:
        text: all that stands beneath the metadata.
        tags: beside those that every folder of smelt has.
        source: the checkpoint it was made from, whose licence it has.
    """
    kept: dict[str, Any] = {}
    if source is not None:
        kept = {"base_model": base_model(source), **_taken_over(source.folder / "README.md")}
    own = ["mixture-of-experts", "smelt", *tags]
    data = ModelCardData(library_name="transformers", tags=own, **kept)
    return f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n\n{NOT_MEASURED}"


def without_results(text: str) -> str:
    """A card without what was measured: of weights that are no longer those that it is about."""
    own = NOT_MEASURED.removeprefix("## Measured\n\n").rstrip()
    text = re.sub(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", own, text, flags=re.DOTALL)
    try:
        found = ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError):  # its metadata cannot be read: it holds none of ours
        return text
    if not isinstance(found.data, ModelCardData) or found.data.eval_results is None:
        return text
    found.data.eval_results = None
    return str(found)


def base_model(checkpoint: Checkpoint) -> str:
    """The source as the hub would name it: its id where it is known, else the folder's name."""
    for part in checkpoint.folder.parts:  # a snapshot in the hub's cache
        if found := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{found[1]}/{found[2]}"
    named = str(checkpoint.config_dict.get("_name_or_path") or "")
    return named if re.fullmatch(r"[\w.-]+/[\w.-]+", named) else checkpoint.folder.name


def _taken_over(path: Path) -> dict[str, Any]:
    """What holds for what is made of a source, by its card; nothing where it has none to read."""
    try:
        own = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}
    return {name: own[name] for name in _TAKEN_OVER if own.get(name)}
