"""A GGUF file written whole or not at all, tensor after tensor, and read as a checkpoint."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError, RecipeError
from smelt.export.architectures import Target, find_target
from smelt.export.engine import library
from smelt.export.tensors import Part, list_parts
from smelt.export.tokens import Vocabulary, read_vocabulary
from smelt.export.types import Scheme, bytes_of, encode, find_scheme, type_of
from smelt.outputs import check_new

Progress = Callable[[str, int, int], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Written:
    """A GGUF file that was made of a checkpoint."""

    path: Path
    architecture: str
    scheme: str  # F32, F16, BF16, Q8_0, Q4_K
    num_tensors: int
    num_bytes: int  # of the file
    bytes_before: int  # of the checkpoint's weights
    types: dict[str, int]  # tensors by type
    wider: tuple[str, ...]  # tensors whose rows do not divide into the type that was asked for
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Planned:
    part: Part
    types: dict[str, gguf.GGMLQuantizationType]


def export_gguf(
    checkpoint: Checkpoint,
    destination: str | Path,
    *,
    quantise: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write a stock checkpoint as one GGUF file.

    A layer's experts, and their bytes in the file, are in memory at a time.

    Args:
        quantise: a name of `types.QUANTISED`, such as Q8_0 or Q4_K, by llama.cpp's own code; None:
            the type of the weights, or `dtype`.
        dtype: float32, bfloat16 or float16.

    Raises:
        RecipeError: settings that do not go together.
        CheckpointError: llama.cpp would compute another model, or the file cannot be written.
    """
    path = Path(destination).expanduser()
    scheme = _scheme(checkpoint, path, quantise, dtype)
    target = find_target(checkpoint)
    checkpoint.check()
    vocabulary = read_vocabulary(checkpoint)
    plan = [
        _Planned(
            part,
            {n: type_of(n, s, scheme, is_head=n in part.heads) for n, s in part.shapes.items()},
        )
        for part in list_parts(checkpoint, target)
    ]
    temporary = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, checkpoint, target, vocabulary, scheme, plan, progress)
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}).") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return _written(path, checkpoint, target, vocabulary, scheme, plan)


def _scheme(checkpoint: Checkpoint, path: Path, quantise: str | None, dtype: str | None) -> Scheme:
    """The types of the file, settings checked."""
    if path.suffix != ".gguf":
        raise RecipeError(f"{path}: a GGUF file is named OUT.gguf.")
    check_new(path)
    if quantise is not None and dtype is not None:
        raise RecipeError("--quantise and --dtype both say what the weights become: give one.")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: say one of {', '.join(DTYPES)}.")
    scheme = find_scheme(quantise, DTYPES[dtype] if dtype else checkpoint.dtype)
    if scheme.is_quantised:
        library()
    return scheme


def _write(
    path: Path,
    checkpoint: Checkpoint,
    target: Target,
    vocabulary: Vocabulary,
    scheme: Scheme,
    plan: Sequence[_Planned],
    progress: Progress | None,
) -> None:
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, target.name)
    try:
        _metadata(writer, checkpoint, target, scheme)
        vocabulary.write(writer)
        for planned in plan:
            for name, shape in planned.part.shapes.items():
                kind = planned.types[name]
                writer.add_tensor_info(
                    name, shape, np.dtype(np.float32), bytes_of(shape, kind), raw_dtype=kind
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, planned in enumerate(plan):
            _write_part(writer, planned)
            if progress:
                progress(next(iter(planned.types)), done + 1, len(plan))
    finally:
        writer.close()


def _write_part(writer: gguf.GGUFWriter, planned: _Planned) -> None:
    """Read, encode and write; nothing of it is left in memory for the next."""
    tensors = planned.part.read()
    for (name, kind), tensor in zip(planned.types.items(), tensors, strict=True):
        writer.write_tensor_data(encode(name, tensor, kind))


def _metadata(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, target: Target, scheme: Scheme
) -> None:
    """Everything but the tokenizer. No time of day: the same export gives the same bytes."""
    writer.add_name(checkpoint.folder.name)
    writer.add_type("model")
    writer.add_file_type(int(scheme.file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("smelt.version", version("smelt"))
    writer.add_string("smelt.source.fingerprint", checkpoint.fingerprint)
    writer.add_string("smelt.quantisation", scheme.name)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in target.settings.items():
        if isinstance(value, str):
            writer.add_string(f"{target.name}.{key}", value)
        else:
            add[type(value)](f"{target.name}.{key}", value)


def _written(
    path: Path,
    checkpoint: Checkpoint,
    target: Target,
    vocabulary: Vocabulary,
    scheme: Scheme,
    plan: Sequence[_Planned],
) -> Written:
    kinds = {name: kind for planned in plan for name, kind in planned.types.items()}
    types: dict[str, int] = {}
    for kind in kinds.values():
        types[kind.name] = types.get(kind.name, 0) + 1
    wanted = (scheme.matrix, scheme.head, gguf.GGMLQuantizationType.F32)
    return Written(
        path=path,
        architecture=target.name,
        scheme=scheme.name,
        num_tensors=len(kinds),
        num_bytes=path.stat().st_size,
        bytes_before=checkpoint.bytes_of(checkpoint.state),
        types=dict(sorted(types.items())),
        wider=tuple(name for name, kind in kinds.items() if kind not in wanted),
        notes=(*target.notes, *vocabulary.notes, *_left_out(checkpoint)),
    )


def _left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the checkpoint holds and transformers does not run: layers of multi-token prediction."""
    count = len(checkpoint.extra_keys)
    if not count:
        return ()
    first = checkpoint.extra_keys[0]
    return (f"{count} tensors that transformers does not use are left out, {first} the first",)


class GgufFile:
    """A GGUF file opened for reading: its metadata and where its tensors lie."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: not a GGUF file, or a damaged one.
        """
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file.")
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the library raises whatever reading past the end does
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no header"
            raise CheckpointError(f"{path}: not a readable GGUF file ({reason}).") from None

    def get(self, key: str) -> Any:
        """A value of the metadata; None where there is none."""
        found = self._reader.get_field(key)
        return None if found is None else found.contents()

    @property
    def folder(self) -> Path:
        """What stands for it in a record: the file."""
        return self.path

    @cached_property
    def dtype(self) -> str:
        """Its quantisation, as its own metadata names it."""
        named = self.get("smelt.quantisation")
        if named is None and (number := self.get("general.file_type")) is not None:
            named = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        return str(named or "unknown")

    @cached_property
    def context_length(self) -> int:
        """Positions that the model was made for."""
        return int(self.get(f"{self.get('general.architecture')}.context_length"))

    @cached_property
    def num_params(self) -> int:
        """Numbers in all of its tensors."""
        return sum(int(tensor.n_elements) for tensor in self._reader.tensors)

    @cached_property
    def num_bytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    @cached_property
    def fingerprint(self) -> str:
        """A hash as of a checkpoint folder: the header, and sixteen bytes of every tensor."""
        digest = hashlib.sha256()
        with self.path.open("rb") as handle:
            digest.update(handle.read(self._reader.data_offset))
            for tensor in self._reader.tensors:
                size = int(tensor.n_bytes)
                handle.seek(int(tensor.data_offset) + size // 2)
                digest.update(handle.read(min(16, size - size // 2)))
        return digest.hexdigest()
