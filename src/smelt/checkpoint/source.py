"""A checkpoint opened for reading: its configuration, skeleton, blocks, and where each tensor lies.

No weight is read here before somebody asks for one. Names on disk are translated with the rules of
transformers' own loader, so a family needs no entry for its disk layout.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from smelt.checkpoint import quantised, shards, skeleton
from smelt.checkpoint.layout import Layout, translate
from smelt.errors import CheckpointError

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the path itself, or a hub id's snapshot."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(
            f"{source}: not a checkpoint folder. Give a folder with config.json and safetensors "
            "files, or a hub id such as org/name."
        )
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises dozens of types, all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source}: no such folder here, and the hub did not give it ({reason})."
        ) from None


class Checkpoint:
    """One checkpoint folder: `Checkpoint.open(path_or_hub_id)`."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.config_dict = self._read_config()
        self.config = self._parse_config()
        self.tensors = quantised.present(shards.list_tensors(folder), self.config_dict)
        self.cls = skeleton.model_class(self.config, str(folder), trust_remote_code)

    @classmethod
    def open(
        cls, source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
    ) -> "Checkpoint":
        """A local folder or a hub id, headers checked, no weights read.

        Raises:
            CheckpointError: not a checkpoint, a missing or truncated shard, an unknown family,
                weights that are pickled or quantised in a way smelt cannot read.
        """
        return cls(locate(source, revision), trust_remote_code=trust_remote_code)

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{self.folder}: no config.json, so this is not a checkpoint. "
                "Give a folder that save_pretrained wrote."
            )
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}: not readable JSON ({error}).") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: holds {type(config).__name__}, not a configuration.")
        return config

    def _parse_config(self) -> PreTrainedConfig:
        kind = self.config_dict.get("model_type", "none")
        if "auto_map" in self.config_dict and kind != "smelt_mapped" and not self.trust_remote_code:
            try:
                return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            except ValueError:
                raise CheckpointError(
                    f"{self.folder}: model type {kind!r} needs code from the checkpoint. Read that "
                    "code, and if you trust it, allow it with --trust-remote-code."
                ) from None
        try:
            return AutoConfig.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code and kind != "smelt_mapped"
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder}: transformers cannot read config.json of model type {kind!r} "
                f"({str(error).strip().splitlines()[0]}). A newer transformers may know the "
                "family; docs/add-a-family.md says how one is added."
            ) from None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type the model computes in: the configuration's, or that of the largest tensor."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        floats = [t for t in self.tensors.values() if t.dtype.is_floating_point]
        return max(floats, key=lambda t: t.num_bytes).dtype if floats else torch.float32

    @cached_property
    def model(self) -> PreTrainedModel:
        """The skeleton: transformers' class with its parameters on the meta device."""
        return self.skeleton()

    def skeleton(self) -> PreTrainedModel:
        """A fresh skeleton (the walk fills and empties one)."""
        try:
            return skeleton.build(self.cls, self.config, self.dtype)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder}: transformers cannot build {self.cls.__name__} from config.json "
                f"({error})."
            ) from error

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the weights.

        Raises:
            CheckpointError: there is none, or transformers cannot read it.
        """
        try:
            return read_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # tokenizers raise anything from OSError to bare Exception
            raise CheckpointError(
                f"{self.folder}: no readable tokenizer beside the weights "
                f"({type(error).__name__}). Text needs one: copy the tokenizer files of the "
                "original model into the folder."
            ) from None

    @cached_property
    def _conversions(self) -> list[Any]:
        if self.config.model_type == "smelt_mapped":
            return []
        return get_model_conversion_mapping(self.model)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Every parameter and stored buffer of the model, on meta, tied names included."""
        return dict(self.model.state_dict())

    @cached_property
    def layout(self) -> dict[str, Layout]:
        """Where each of the model's tensors lies on disk."""
        return self._translate[0]

    @cached_property
    def extra_keys(self) -> list[str]:
        """Keys on disk that the model does not use (multi-token prediction, stray buffers)."""
        return self._translate[1]

    @cached_property
    def _translate(self) -> tuple[dict[str, Layout], list[str]]:
        return translate(self.model, self._conversions, self.tensors, self.state)

    @cached_property
    def _ties(self) -> dict[str, list[str]]:
        """Names that share one parameter, by each of them."""
        groups: dict[int, list[str]] = {}
        for name, param in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(param), []).append(name)
        return {name: names for names in groups.values() for name in names}

    def stored_name(self, name: str) -> str | None:
        """The name under which a parameter lies on disk: its own, or one it is tied to."""
        candidates = [name, *self._ties.get(name, [])]
        return next((n for n in candidates if n in self.layout), None)

    def check(self) -> None:
        """Every parameter is on disk, in the shape the configuration says.

        Raises:
            CheckpointError: the first parameter that is not.
        """
        for name, expected in self.state.items():
            stored = self.stored_name(name)
            if stored is None:
                if name in dict(self.model.named_buffers()):
                    continue
                raise CheckpointError(
                    f"{self.folder}: {name} is missing from the weights. A shard is missing or the "
                    "checkpoint is of another model: compare the folder with its source."
                )
            shapes = {key: self.tensors[key].shape for key in self.layout[stored].all_keys()}
            self.layout[stored].check(f"{self.folder}: {name}", shapes, tuple(expected.shape))

    def read(self, name: str) -> Tensor:
        """One parameter or buffer as the model holds it, in the type it has on disk, on the CPU."""
        stored = self.stored_name(name)
        if stored is None:
            raise CheckpointError(f"{self.folder}: {name} is missing from the weights.")
        layout = self.layout[stored]
        return layout.read(stored, self.tensors, self.model, tuple(self.state[stored].shape))

    @cached_property
    def blocks(self) -> dict[str, list[str]]:
        """The state names of each block, in order; "" holds what lies outside all blocks."""
        members: dict[str, list[str]] = {name: [] for name in skeleton.outermost_blocks(self.model)}
        members[""] = []
        for name in self.state:
            parts = name.split(".")
            prefixes = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
            members[next((p for p in prefixes if p in members), "")].append(name)
        return members

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes on disk of these parameters, shared keys counted once."""
        keys = {
            key
            for name in names
            if (stored := self.stored_name(name)) is not None
            for key in self.layout[stored].all_keys()
        }
        return sum(self.tensors[key].num_bytes for key in keys)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells checkpoints apart: configuration, headers, and bytes of every tensor.

        Sixteen bytes are read at the middle of each tensor, not the whole file: it tells a
        fine-tune from its base in a second, and is no check against damage.
        """
        digest = hashlib.sha256(json.dumps(self.config_dict, sort_keys=True).encode())
        handles = {}
        try:
            for key, entry in sorted(shards.list_tensors(self.folder).items()):
                if entry.file not in handles:
                    handles[entry.file] = entry.file.open("rb")
                handle = handles[entry.file]
                handle.seek(entry.offset + entry.num_bytes // 2)
                sample = handle.read(min(16, entry.num_bytes - entry.num_bytes // 2))
                digest.update(f"{key} {entry.dtype} {entry.shape}".encode() + sample)
        finally:
            for handle in handles.values():
                handle.close()
        return digest.hexdigest()


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder.

    Raises:
        FileNotFoundError: none of its files is there (transformers would make an empty tokenizer of
            the family's kind, to which every word is unknown).
    """
    found = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    files = set(found.vocab_files_names.values())
    if files and not any((folder / name).is_file() for name in files | {"tokenizer.json"}):
        raise FileNotFoundError(f"none of {', '.join(sorted(files))}")
    return found
