"""A checkpoint opened for reading: its configuration, skeleton, blocks, and where each tensor lies.

No weight is read here before somebody asks for one. Names on disk are translated with the rules of
transformers' own loader, so a family needs no entry for its disk layout.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from smelt.checkpoint import quantised, shards, skeleton
from smelt.errors import CheckpointError

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Layout:
    """Where one parameter lies on disk: its keys by source pattern, and how they are joined."""

    converter: WeightConverter | None
    keys: dict[str, list[str]] = field(default_factory=dict)
    first: str = ""  # the converter's first target, which names the group

    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]


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
                f"({str(error).strip().splitlines()[0]}). A newer transformers may know the family; "
                "docs/add-a-family.md says how one is added."
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
                f"{self.folder}: transformers cannot build {self.cls.__name__} from config.json ({error})."
            ) from error

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the weights.

        Raises:
            CheckpointError: there is none, or transformers cannot read it.
        """
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # tokenizers raise anything from OSError to bare Exception
            raise CheckpointError(
                f"{self.folder}: no readable tokenizer beside the weights ({type(error).__name__}). "
                "Text needs one: copy the tokenizer files of the original model into the folder."
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
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        prefix = self.model.base_model_prefix
        layout: dict[str, Layout] = {}
        extra: list[str] = []
        for key in sorted(self.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self.state)
            if name not in self.state and key in self.state:
                name, pattern = key, None
            targets = [name]
            if pattern is not None:
                patterns = by_pattern[pattern].target_patterns
                targets += [name.replace(patterns[0], p) for p in patterns[1:]]
            if name not in self.state:
                extra.append(key)
                continue
            found = layout.setdefault(
                name, Layout(None if pattern is None else by_pattern[pattern], first=name)
            )
            found.keys.setdefault(pattern or "", []).append(key)
            layout.update({t: found for t in targets[1:] if t in self.state})
        return layout, extra

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
            self._check_shape(name, self.layout[stored], tuple(expected.shape))

    def _check_shape(self, name: str, layout: Layout, expected: tuple[int, ...]) -> None:
        shapes = [self.tensors[key].shape for key in layout.all_keys()]
        if layout.converter is None and shapes[0] != expected:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {list(shapes[0])} on disk, config.json says "
                f"{list(expected)}. Weights and configuration are of different models."
            )
        if is_stacked(layout):
            for pattern, keys in layout.keys.items():
                if len(keys) != expected[0]:
                    raise CheckpointError(
                        f"{self.folder}: {name} has {len(keys)} experts on disk ({pattern}), "
                        f"config.json says {expected[0]}. A shard is missing, or the configuration "
                        "is of another model: compare the folder with its source."
                    )
            if len(layout.keys) != len(layout.converter.source_patterns):  # type: ignore[union-attr]
                raise CheckpointError(
                    f"{self.folder}: {name} lacks one of {layout.converter.source_patterns}."  # type: ignore[union-attr]
                )

    def read(self, name: str) -> Tensor:
        """One parameter or buffer as the model holds it, in the type it has on disk, on the CPU."""
        stored = self.stored_name(name)
        if stored is None:
            raise CheckpointError(f"{self.folder}: {name} is missing from the weights.")
        layout = self.layout[stored]
        if layout.converter is None:
            return self.tensors[layout.all_keys()[0]].read()
        if is_stacked(layout):
            return self._read_stacked(layout, tuple(self.state[stored].shape))
        converter = copy.deepcopy(layout.converter)
        for pattern, keys in layout.keys.items():
            for key in keys:
                converter.add_tensor(layout.first, key, pattern, self.tensors[key].read)
        joined = converter.convert(layout.first, model=self.model, config=self.model.config)
        value = joined[stored]
        return value[0] if isinstance(value, list) else value

    def _read_stacked(self, layout: Layout, shape: tuple[int, ...]) -> Tensor:
        """Experts stored one by one, read straight into their place in the fused parameter."""
        dtype = self.tensors[layout.all_keys()[0]].dtype
        out = torch.empty(shape, dtype=dtype)
        start = 0
        assert layout.converter is not None
        for pattern in layout.converter.source_patterns:
            keys = layout.keys[pattern]
            rows = self.tensors[keys[0]].shape[0]
            for expert, key in enumerate(keys):
                place = out[expert] if len(layout.keys) == 1 else out[expert, start : start + rows]
                stored = self.tensors[key]
                if stored.shape != tuple(place.shape) or stored.dtype != dtype:
                    raise CheckpointError(
                        f"{self.folder}: {key} is {list(stored.shape)} {stored.dtype}, the other "
                        f"experts are {list(place.shape)} {dtype}. The weights are damaged."
                    )
                stored.read_into(place)
            start += rows
        return out

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
        """A hash that tells checkpoints apart: configuration, every header, and bytes of every tensor.

        Sixteen bytes are read at the middle of each tensor, not the whole file: it tells a fine-tune from its
        base in a second, and is no check against damage.
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


def is_stacked(layout: Layout) -> bool:
    """Whether the parameter is plainly its experts stacked, [gate; up] concatenated per expert."""
    if layout.converter is None:
        return False
    ops = layout.converter.operations
    stacked = bool(ops) and isinstance(ops[0], MergeModulelist) and ops[0].dim == 0
    joined = len(ops) == 1 or (
        len(ops) == 2 and isinstance(ops[1], Concatenate) and ops[1].dim == 1
    )
    return stacked and joined and len(layout.converter.target_patterns) == 1
