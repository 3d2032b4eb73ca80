"""How a parameter of the model lies on disk, by the rules of transformers' own loader.

A family that stores experts one by one, under other names, or interleaved needs no entry here: its
conversions are read from transformers, and run backwards to write the result.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from smelt.checkpoint.quantised import Stored
from smelt.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass
class Layout:
    """Where one parameter lies on disk: its keys by source pattern, and how they are joined."""

    converter: WeightConverter | None  # None: one key, as it is
    keys: dict[str, list[str]] = field(default_factory=dict)  # by pattern; experts in order
    first: str = ""  # the converter's first target, which names the group

    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter is plainly its experts stacked, [gate; up] joined per expert."""
        if self.converter is None:
            return False
        ops = self.converter.operations
        stacked = bool(ops) and isinstance(ops[0], MergeModulelist) and ops[0].dim == 0
        joined = len(ops) == 1 or (
            len(ops) == 2 and isinstance(ops[1], Concatenate) and ops[1].dim == 1
        )
        return stacked and joined and len(self.converter.target_patterns) == 1

    def check(self, what: str, shapes: Mapping[str, Shape], expected: Shape) -> None:
        """Raise CheckpointError unless the keys can make a parameter of the expected shape."""
        if self.converter is None:
            found = shapes[self.all_keys()[0]]
            if found != expected:
                raise CheckpointError(
                    f"{what} has shape {list(found)} on disk, config.json says {list(expected)}. "
                    "Weights and configuration are of different models."
                )
            return
        if not self.is_stacked:
            return
        for pattern in self.converter.source_patterns:
            num_found = len(self.keys.get(pattern, []))
            if num_found != expected[0]:
                raise CheckpointError(
                    f"{what} has {num_found} experts on disk ({pattern}), config.json says "
                    f"{expected[0]}. A shard is missing, or the configuration is of another model: "
                    "compare the folder with its source."
                )
        self._check_experts(what, shapes, expected)

    def _check_experts(self, what: str, shapes: Mapping[str, Shape], expected: Shape) -> None:
        """Every expert on disk is as large as its place in the parameter."""
        assert self.converter is not None
        for parts in zip(*(self.keys[p] for p in self.converter.source_patterns), strict=True):
            found = [shapes[key] for key in parts]
            rows = (sum(shape[0] for shape in found),) if len(found) > 1 else found[0][:1]
            if (*rows, *found[0][1:]) != expected[1:] or len({s[1:] for s in found}) > 1:
                raise CheckpointError(
                    f"{what}: {parts[0]} has shape {list(found[0])} on disk, config.json says "
                    f"{list(expected[1:])} for each expert. Weights and configuration are of "
                    "different models, or a shard is damaged."
                )

    def read(
        self, name: str, tensors: Mapping[str, Stored], model: PreTrainedModel, shape: Shape
    ) -> Tensor:
        """The parameter as the model holds it, in the type it has on disk."""
        if self.converter is None:
            return tensors[self.all_keys()[0]].read()
        if self.is_stacked:
            return self._read_stacked(tensors, shape)
        converter = copy.deepcopy(self.converter)
        for pattern, keys in self.keys.items():
            for key in keys:
                # transformers' own loader gives a callable here too, whatever the annotation says.
                converter.add_tensor(self.first, key, pattern, tensors[key].read)  # type: ignore[arg-type]
        value = converter.convert(self.first, model=model, config=model.config)[name]
        return value[0] if isinstance(value, list) else value

    def _read_stacked(self, tensors: Mapping[str, Stored], shape: Shape) -> Tensor:
        """Experts stored one by one, read straight into their place in the fused parameter."""
        dtype = tensors[self.all_keys()[0]].dtype
        out = torch.empty(shape, dtype=dtype)
        for pattern, rows in self._rows(tensors).items():
            for expert, key in enumerate(self.keys[pattern]):
                place, stored = out[expert, rows], tensors[key]
                if stored.shape != tuple(place.shape) or stored.dtype != dtype:
                    raise CheckpointError(
                        f"{key} is {list(stored.shape)} {stored.dtype}, the other experts are "
                        f"{list(place.shape)} {dtype}. The weights are damaged."
                    )
                stored.read_into(place)
        return out

    def _rows(self, tensors: Mapping[str, Stored]) -> dict[str, Any]:
        """Which rows of an expert each pattern fills: all of them, or its part of [gate; up]."""
        if len(self.keys) == 1:
            return dict.fromkeys(self.keys, ...)
        rows, start = {}, 0
        assert self.converter is not None
        for pattern in self.converter.source_patterns:
            stop = start + tensors[self.keys[pattern][0]].shape[0]
            rows[pattern], start = slice(start, stop), stop
        return rows

    def encode(
        self, what: str, value: Tensor, tensors: Mapping[str, Stored], model: PreTrainedModel
    ) -> dict[str, Tensor]:
        """A new value under the family's keys; experts stored one by one take the first keys."""
        if self.converter is None:
            return {self.all_keys()[0]: value}
        if self.is_stacked:
            return {
                key: expert[rows]
                for pattern, rows in self._rows(tensors).items()
                for key, expert in zip(self.keys[pattern], value, strict=False)
            }
        converter: Any = copy.deepcopy(self.converter).reverse_transform()
        converter.add_tensor(self.first, self.first, converter.source_patterns[0], value)
        back = converter.convert(self.first, model=model, config=model.config)
        found = [t[0] if isinstance(t, list) else t for t in back.values()]
        keys = self.all_keys()
        if len(found) == len(keys) == 1:
            return {keys[0]: found[0].contiguous()}
        unknown = sorted(set(back) - set(tensors))
        if unknown:
            raise CheckpointError(
                f"{what} cannot be written back in the family's disk layout ({unknown[0]} is new). "
                "The mapped form can hold it: --form mapped."
            )
        return dict(zip(back, found, strict=True))


def translate(
    model: PreTrainedModel,
    conversions: list[Any],
    keys: Mapping[str, Any],
    state: dict[str, Tensor],
) -> tuple[dict[str, Layout], list[str]]:
    """The layout of each of the model's tensors, and the keys that the model does not use."""
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    layout: dict[str, Layout] = {}
    extra: list[str] = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            extra.append(key)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        found = layout.setdefault(name, Layout(converter, first=name))
        found.keys.setdefault(pattern or "", []).append(key)
        if converter is not None:
            others = (
                name.replace(converter.target_patterns[0], p) for p in converter.target_patterns[1:]
            )
            layout.update({other: found for other in others if other in state})
    return layout, extra
