"""The folder of a healed checkpoint: the student's, with other weights and the run's own record."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from smelt.checkpoint.card import without_results
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.verify import SUMS
from smelt.errors import RecipeError
from smelt.train.checkpoints import write

HEALING = "healing.json"
OWN = {"recipe.yaml": "heal.yaml", "log.jsonl": "heal-log.jsonl"}
"""What the run writes into smelt/, and its name in the result, where the student's own lie too."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf"}


def saved_type(student: Checkpoint, named: str | None) -> torch.dtype:
    """The type of the saved weights: the one named, or the student's."""
    found: torch.dtype = student.dtype if named is None else getattr(torch, named)
    if not found.is_floating_point or found.itemsize < 2:
        raise RecipeError(
            f"dtype: {student.folder} is stored in {str(found).removeprefix('torch.')}, which "
            "cannot be trained. Name the type to save in: --set dtype=bfloat16."
        )
    return found


@torch.no_grad()
def write_weights(
    model: PreTrainedModel,
    student: Checkpoint,
    folder: Path,
    dtype: torch.dtype,
    *,
    keep_types: bool,
) -> None:
    """Save the model; afterwards it is in float32 again, its values rounded as they were saved.

    Args:
        model: healed, merged and closed.
        student: whose tokenizer is saved beside it.
        folder: where to.
        dtype: of the saved weights.
        keep_types: what the student's model holds in another type (float32 selection biases in a
            bfloat16 model) stays in that.
    """
    model.cpu()
    saved = model.state_dict(keep_vars=True)  # without buffers that are computed
    numbers = {name: tensor for name, tensor in saved.items() if tensor.is_floating_point()}
    for name, tensor in numbers.items():
        own = student.state.get(name)
        tensor.data = tensor.data.to(own.dtype if keep_types and own is not None else dtype)
    write(model, student.tokenizer, folder, model.dtype)
    for tensor in numbers.values():
        tensor.data = tensor.data.float()


def finish(student: Checkpoint, partial: Path, output: Path, result: dict[str, Any]) -> None:
    """Take over what lay beside the student's weights, and give the folder its name.

    Args:
        student: whose form the result has.
        partial: the folder of the run, its weights written.
        output: what it becomes.
        result: for smelt/healing.json; earlier healings of the student are added to it.
    """
    own = partial / "smelt"
    for name, other in OWN.items():
        if (own / name).is_file():
            (own / name).replace(own / other)
    _take_over(student, partial)
    if student.extra_keys:
        warnings.warn(
            f"{student.folder}: {len(student.extra_keys)} tensors that the model does not use "
            "(multi-token prediction) are left out: they would not fit the healed weights.",
            stacklevel=3,
        )
    earlier = student.folder / "smelt" / HEALING
    if earlier.is_file():
        result["earlier"] = json.loads(earlier.read_text(encoding="utf-8"))
    spelt = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (own / HEALING).write_text(spelt, encoding="utf-8")
    sums = {path.name: _sha256(path) for path in sorted(partial.glob("*.safetensors"))}
    (partial / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    _note(partial / "README.md", result)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    for name in ("started.json", "before.json"):
        (output / "smelt" / name).unlink()
    for path in (output / "smelt").glob("checkpoint-*"):
        shutil.rmtree(path)


def _take_over(student: Checkpoint, partial: Path) -> None:
    """All that lies beside the student's weights, also in smelt/: plan, recipe, provenance.

    What the run wrote stays, but for the tokenizer and the generation settings, which are taken as
    they were.
    """
    known = {"config.json", SUMS, f"smelt/{HEALING}"}
    for path in sorted(student.folder.rglob("*")):
        relative = path.relative_to(student.folder)
        is_hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
        is_weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if is_hidden or is_weights or not path.is_file() or relative.as_posix() in known:
            continue
        if path.suffix == ".py" and (partial / relative).exists():
            continue  # the modelling files of this version of smelt
        (partial / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, partial / relative)


def _note(path: Path, result: Mapping[str, Any]) -> None:
    """A paragraph on the healing at the end of the model card."""
    rows = [
        f"| {name} | {old['nats_per_token']:.4f} | {new['nats_per_token']:.4f} | "
        f"{old['kl_to_teacher']:.4f} | {new['kl_to_teacher']:.4f} |"
        for (name, old), new in zip(result["before"].items(), result["after"].values(), strict=True)
    ]
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    text = without_results(text).rstrip() + "\n\n" if text else ""
    path.write_text(
        f"{text}## Healing\n\nTrained towards `{result['teacher']['name']}` by `smelt heal`, "
        f"{result['steps']} steps, {result['tokens_trained']:,} tokens (smelt/heal.yaml).\n\n"
        "| held-out text | nats before | after | KL to the teacher before | after |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + "\n",
        encoding="utf-8",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
