"""Writing a checkpoint: one shard per block into a staging folder, renamed when it is complete.

A shard that is there is whole, so a killed run goes on where it stopped; the destination exists
only once everything in it does.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from smelt.checkpoint import mapped
from smelt.checkpoint.families import COUNT_FIELDS, MTP_FIELDS
from smelt.checkpoint.shards import INDEX, SINGLE, read_header, write_shard
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError
from smelt.outputs import check_writable

JOURNAL = "journal.json"
SUMS = "smelt/sha256.json"
FITS = "fits"
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf"}


class Sink:
    """A checkpoint folder in the making, beside the place it will take.

    Args:
        destination: the folder to be; must not exist.
        source: the checkpoint it is made from; its folder is never written to.
        key: names this very compression; a staging folder of another one is refused.
        num_bytes: tensor bytes to be written, checked against the space there is.

    Raises:
        CheckpointError: the destination exists or lies inside the source; too little space.
        RecipeError: it cannot be written.
    """

    def __init__(
        self, destination: str | Path, source: Checkpoint, *, key: str, num_bytes: int = 0
    ) -> None:
        self.destination = check_destination(destination, source.folder)
        self.source = source
        self.staging = self.destination.with_name(self.destination.name + ".partial")
        self._begin(key, num_bytes)

    def _begin(self, key: str, num_bytes: int) -> None:
        journal = self.staging / "smelt" / JOURNAL
        try:
            if journal.is_file():
                if json.loads(journal.read_text()).get("key") != key:
                    raise CheckpointError(
                        f"{self.staging}: holds another unfinished compression. Finish it with its "
                        "own settings, or remove that folder."
                    )
            else:
                if self.staging.exists() and any(f.name != "smelt" for f in self.staging.iterdir()):
                    raise CheckpointError(
                        f"{self.staging}: exists and is no unfinished compression. Remove it, or "
                        "choose another output."
                    )
                journal.parent.mkdir(parents=True, exist_ok=True)
                _write_text(journal, json.dumps({"key": key}) + "\n")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.staging}: cannot be written ({error}).") from None
        written = sum(f.stat().st_size for f in self.staging.glob("*.safetensors"))
        free = shutil.disk_usage(self.staging).free
        if num_bytes - written > free:
            raise CheckpointError(
                f"{self.destination.parent}: {free / 1e9:.2f} GB free, the output needs "
                f"{(num_bytes - written) / 1e9:.2f} GB more. Free space or choose another output; "
                "what is done so far is kept."
            )

    def abandon(self) -> None:
        """Undo a beginning that comes to nothing. Statistics that lie there stay, for another."""
        (self.staging / "smelt" / JOURNAL).unlink(missing_ok=True)
        if not (self.staging / "smelt" / "stats").exists():
            shutil.rmtree(self.staging, ignore_errors=True)

    def shard(self, index: int, count: int) -> Path:
        """The file of shard `index` of `count`, in the staging folder."""
        name = SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        return self.staging / name

    def has(self, index: int, count: int) -> bool:
        """Whether that shard is written (and therefore whole)."""
        return self.shard(index, count).is_file()

    def write(self, index: int, count: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard; an empty one is written too, as a sign that it is done."""
        ordered = {key: tensors[key] for key in sorted(tensors, key=dot_natural_key)}
        file = self.shard(index, count)
        try:
            sums = self._sums() | {file.name: write_shard(file, ordered)}
            _write_text(self.staging / SUMS, json.dumps(sums, indent=1) + "\n")
        except OSError as error:
            file.with_name(file.name + ".writing").unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.staging}: writing failed ({error.strerror or error}). What is done so far "
                "is kept: mend the cause and run the same command again."
            ) from None

    def finish(self, count: int, config: Mapping[str, Any], documents: Mapping[str, str]) -> Path:
        """Write index, configuration and documents, copy everything else, and rename.

        Args:
            config: config.json of the result.
            documents: further files by relative path: the plan, the recipe, the model card.
        """
        try:
            self._write_index(count)
            self._copy_others(documents)
            _write_text(self.staging / "config.json", json.dumps(config, indent=2) + "\n")
            if config.get("model_type") == mapped.SmeltMappedConfig.model_type:
                mapped.copy_code(self.staging)
            for name, text in documents.items():
                (self.staging / name).parent.mkdir(parents=True, exist_ok=True)
                _write_text(self.staging / name, text)
            self._complete_sums()
            for name in ("stats", FITS):
                shutil.rmtree(self.staging / "smelt" / name, ignore_errors=True)
            self.staging.replace(self.destination)
            (self.destination / "smelt" / JOURNAL).unlink()
        except OSError as error:
            raise CheckpointError(
                f"{self.staging}: writing failed ({error.strerror or error}). What is done so far "
                "is kept: mend the cause and run the same command again."
            ) from None
        return self.destination

    def _write_index(self, count: int) -> None:
        if count == 1:
            return
        weight_map, total = {}, 0
        for index in range(count):
            file = self.shard(index, count)
            entries = read_header(file)
            weight_map.update(dict.fromkeys(entries, file.name))
            total += sum(entry.num_bytes for entry in entries.values())
        ordered = {key: weight_map[key] for key in sorted(weight_map, key=dot_natural_key)}
        index_text = {"metadata": {"total_size": total}, "weight_map": ordered}
        _write_text(self.staging / INDEX, json.dumps(index_text, indent=2) + "\n")

    def _copy_others(self, documents: Mapping[str, str]) -> None:
        """Tokenizer, generation config, chat template, licence: all that lies beside weights."""
        skip = {"config.json", INDEX, *documents}
        for path in sorted(self.source.folder.rglob("*")):
            relative = path.relative_to(self.source.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if hidden or relative.parts[0] in ("smelt", "__pycache__") or not path.is_file():
                continue
            is_weights = path.suffix in _WEIGHT_FILES or path.name.endswith(".index.json")
            if is_weights or str(relative) in skip:
                continue
            (self.staging / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self.staging / relative)

    def _sums(self) -> dict[str, str]:
        file = self.staging / SUMS
        return json.loads(file.read_text()) if file.is_file() else {}

    def _complete_sums(self) -> None:
        """Add the checksum of a shard whose run was killed between writing it and noting it."""
        sums = self._sums()
        for file in sorted(self.staging.glob("*.safetensors")):
            if file.name not in sums:
                with file.open("rb") as handle:
                    sums[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
        ordered = {name: sums[name] for name in sorted(sums)}
        _write_text(self.staging / SUMS, json.dumps(ordered, indent=1) + "\n")


def check_destination(destination: str | Path, source: Path) -> Path:
    """The destination as an absolute path, or a SmeltError if it cannot be one."""
    path = Path(destination).expanduser().resolve()
    if path == source or source in path.parents:
        raise CheckpointError(
            f"{destination}: lies inside the source checkpoint. Choose a folder outside it."
        )
    if path.exists():
        raise CheckpointError(
            f"{destination}: exists. smelt overwrites nothing: choose another output or remove it."
        )
    check_writable(path, "output folder")
    return path


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def encode(source: Checkpoint, name: str, value: Tensor) -> dict[str, Tensor]:
    """A new value of one parameter, under the keys that the family has on disk."""
    stored = source.stored_name(name)
    assert stored is not None, name
    return source.layout[stored].encode(
        f"{source.folder}: {name}", value, source.tensors, source.model
    )


def stock_config(
    source: Checkpoint,
    num_experts: int,
    fields: Mapping[str, Any] | None = None,
    *,
    without_mtp: bool,
) -> dict[str, Any]:
    """config.json with another expert count; else only what can no longer hold is changed.

    Args:
        fields: of the text model, and what they become.
    """
    config = copy.deepcopy(source.config_dict)
    before = {
        name: value
        for part in (source.config, source.config.get_text_config())
        for name in COUNT_FIELDS
        if isinstance(value := getattr(part, name, None), int)
    }
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for name in [n for n in COUNT_FIELDS if n in part and part[n] == before.get(n)]:
                part[name] = num_experts
    nested = config.get("text_config")
    (nested if isinstance(nested, dict) else config).update(fields or {})
    return plain_config(config, without_mtp=without_mtp)


def plain_config(config: Mapping[str, Any], *, without_mtp: bool) -> dict[str, Any]:
    """The configuration of unquantised weights, without the prediction layers that were dropped."""
    plain = copy.deepcopy(dict(config))
    plain.pop("quantization_config", None)
    if without_mtp:
        for part in (plain, plain.get("text_config")):
            if isinstance(part, dict):
                part.update({name: 0 for name in MTP_FIELDS if name in part})
    return plain


def mapped_config(
    source: Checkpoint,
    stored: Mapping[str, int],
    constants: Mapping[str, int] | None = None,
    *,
    without_mtp: bool,
) -> dict[str, Any]:
    """config.json of the mapped form: the family's own, and how many experts each module stores.

    Args:
        constants: of the modules that hold some, how many.
    """
    config = plain_config(source.config_dict, without_mtp=without_mtp)
    module = mapped.FILE_NAME.removesuffix(".py")
    base = mapped.config_class(config["model_type"])
    autos = mapped.auto_classes(base)
    if not autos:
        raise CheckpointError(
            f"{source.folder}: {source.cls.__name__} is no language model that transformers' Auto "
            "classes know, so the mapped form cannot hold it. Use form: stock or expanded."
        )
    held = {name: number for name, number in (constants or {}).items() if number}
    config |= {"constant_experts": held} if held else {}
    return config | {
        "model_type": mapped.SmeltMappedConfig.model_type,
        "base_model_type": config["model_type"],
        "base_architecture": source.cls.__name__,
        "architectures": [f"SmeltMapped{source.cls.__name__}"],
        "mapped_experts": dict(stored),
        "auto_map": {"AutoConfig": f"{module}.SmeltMappedConfig"}
        | dict.fromkeys(autos, f"{module}.SmeltMappedModel"),
    }


def factored_config(
    source: Checkpoint,
    stored: Mapping[str, int],
    factors: Mapping[str, Mapping[str, Mapping[str, int]]],
    *,
    without_mtp: bool,
) -> dict[str, Any]:
    """config.json of the mapped form with these modules' experts factored.

    Args:
        factors: by experts module and matrix, {"rank": R, "rows": kept rows of S}; each of the
            modules is in `stored` too.
    """
    config = mapped_config(source, stored, without_mtp=without_mtp)
    plain = {
        module: {m: {"rank": s["rank"], "rows": s["rows"]} for m, s in spec.items()}
        for module, spec in factors.items()
    }
    return config | {"factored_experts": plain}


def raw(source: Checkpoint, keys: Iterable[str]) -> dict[str, Tensor]:
    """These keys as they are on disk (dequantised where they are quantised)."""
    return {key: source.tensors[key].read() for key in keys}
