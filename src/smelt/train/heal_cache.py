"""A teacher's predictions on disk: its k likeliest tokens at every place with a target, made once.

So teacher and student never share memory. What is kept is bound by hashes to the teacher, the
examples, the tokenizer and the settings; a killed run of making it goes on where it stopped.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Walk
from smelt.checkpoint.whole import load_model
from smelt.compress.calibrate import Progress
from smelt.errors import CalibrationError, CheckpointError, RecipeError
from smelt.train.batches import Rows
from smelt.train.data import Example
from smelt.train.distill import CHUNK, IGNORED, Top, top_of
from smelt.train.heal_settings import CacheSettings
from smelt.train.losses import targets

FORMAT = 1
WINDOW_BYTES = 1 << 28  # hidden states of the examples that are walked together
DONE, META = "done.json", "meta.json"
_TYPES = {"float16": np.float16, "bfloat16": np.int16, "float32": np.float32}  # as numpy has them


class Kept:
    """The predictions in a folder, mapped into memory a batch at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        self.offsets = np.load(folder / "offsets.npy")

    def take(self, numbers: list[int], device: torch.device | str = "cpu") -> Top:
        """The predictions at the targets of these examples, one after the other."""
        dtype = getattr(torch, self.meta["values"])
        below = torch.from_numpy(self._rows("below", numbers)).view(dtype)
        ids = torch.from_numpy(self._rows("ids", numbers))
        log_z = torch.from_numpy(self._rows("log_z", numbers)).to(device)
        known = dict(zip(self.meta["temperatures"], log_z.unbind(1), strict=True))
        return Top(below.to(device), ids.to(device), known)

    def nats(self, numbers: list[int]) -> Tensor:
        """The teacher's own loss at those targets."""
        return torch.from_numpy(self._rows("nats", numbers))[:, 0]

    def _rows(self, name: str, numbers: list[int]) -> Any:
        # Mapped anew each time: pages that were read are counted as ours until they are unmapped.
        columns, dtype = _columns(self.meta)[name]
        shape = (int(self.offsets[-1]), columns)
        mapped = np.memmap(self.folder / f"{name}.bin", dtype, "r", shape=shape)
        spans = [mapped[self.offsets[n] : self.offsets[n + 1]] for n in numbers]
        return np.concatenate(spans)


def keep_predictions(
    teacher: Checkpoint,
    rows: Rows,
    settings: CacheSettings,
    *,
    temperature: float,
    tokenizer_sha256: str,
    folder: Path,
    is_named: bool = False,
    progress: Progress | None = None,
) -> Kept:
    """The teacher's predictions on all examples, from the folder if they are there.

    Args:
        teacher: walked block by block, so that no more than one is in memory.
        rows: the examples; a number stands for the same example every time.
        settings: how many tokens are kept, and in which type.
        temperature: of the KL; normalisers are kept for it and for 1.
        tokenizer_sha256: of what made the examples.
        folder: where predictions lie: here, or (not `is_named`) under a name made of all hashes.
        is_named: the folder was asked for by the user, and holds these or nothing.
        progress: told (block, done, total) examples.

    Raises:
        CalibrationError: the named folder holds predictions of another teacher, text or settings.
        RecipeError: more tokens are to be kept than there are.
        CheckpointError: no space, or outputs that are not finite.
    """
    vocabulary = int(teacher.config.get_text_config().vocab_size)
    if settings.top_k > vocabulary:
        raise RecipeError(
            f"cache.top_k = {settings.top_k}: the teacher has {vocabulary} tokens. Keep at most "
            "as many."
        )
    meta = {
        "format": FORMAT,
        "teacher": teacher.fingerprint,
        "examples": examples_sha256(rows),
        "tokenizer": tokenizer_sha256,
        "top_k": settings.top_k,
        "values": settings.values,
        "temperatures": sorted({1.0, temperature}),
        "batch_size": settings.batch_size,
    }
    if not is_named:
        spelt = json.dumps(meta, sort_keys=True).encode()
        folder = folder / f"teacher-{hashlib.sha256(spelt).hexdigest()[:32]}"
    if (folder / META).is_file():
        return _checked(folder, meta)
    partial = folder.with_name(folder.name + ".partial")
    with _alone(partial):
        if not (folder / META).is_file():  # else another process was first
            _make(teacher, rows, meta, partial, progress)
            (partial / DONE).unlink()
            partial.rename(folder)
    return _checked(folder, meta)


def _checked(folder: Path, meta: Mapping[str, Any]) -> Kept:
    kept = Kept(folder)
    other = [name for name in meta if kept.meta.get(name) != meta[name]]
    if other:
        words = {"teacher": "another teacher", "examples": "another text"}
        what = ", ".join(words.get(name, f"another {name}") for name in other)
        raise CalibrationError(
            f"{folder}: holds predictions of {what}. Name another cache.folder, or remove this one."
        )
    return kept


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Within: no other process makes the same predictions; it waits."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    lock = partial.with_name(partial.name + ".lock")
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        lock.unlink(missing_ok=True)


def _make(
    teacher: Checkpoint,
    rows: Rows,
    meta: dict[str, Any],
    partial: Path,
    progress: Progress | None,
) -> None:
    """Fill the folder, window by window, from the batch where an earlier process stopped."""
    done = _begin(partial, rows, meta, is_causal=not teacher.config.is_encoder_decoder)
    offsets = np.load(partial / "offsets.npy")
    size = meta["batch_size"]
    batches = [range(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]
    for window in _windows(teacher, rows, batches, done):
        for batch, logits in _outputs(teacher, [rows.__getitems__(batches[b]) for b in window]):
            numbers = batches[window[batch]]
            example = rows.__getitems__(numbers)
            found = _predictions(logits, _targets(example, teacher), meta)
            if not all(np.isfinite(found[name]).all() for name in ("log_z", "nats")):
                raise CheckpointError(
                    f"{teacher.folder}: the teacher's outputs are NaN or Inf. Its weights are "
                    "damaged, or its numbers do not fit their type."
                )
            for name, values in found.items():
                _write_at(partial / f"{name}.bin", int(offsets[numbers[0]]), values)
        (partial / (DONE + ".part")).write_text(json.dumps({"batches": window[-1] + 1}))
        (partial / (DONE + ".part")).replace(partial / DONE)
        if progress:
            progress("the teacher", min((window[-1] + 1) * size, len(rows)), len(rows))


def _begin(partial: Path, rows: Rows, meta: dict[str, Any], *, is_causal: bool) -> int:
    """Batches that are done; a folder of anything else is made anew."""
    is_begun = (partial / META).is_file() and (partial / DONE).is_file()
    if is_begun and json.loads((partial / META).read_text(encoding="utf-8")) == meta:
        return int(json.loads((partial / DONE).read_text(encoding="utf-8"))["batches"])
    shutil.rmtree(partial, ignore_errors=True)
    counts = [0]
    for at in range(0, len(rows), 256):
        example = rows.__getitems__(range(at, min(at + 256, len(rows))))
        target = targets(example.get("labels", example["input_ids"]), is_causal)
        counts += (target != IGNORED).sum(-1).tolist()
    offsets = np.cumsum(counts)
    columns = _columns(meta)
    row_bytes = sum(number * np.dtype(dtype).itemsize for number, dtype in columns.values())
    needed, free = row_bytes * int(offsets[-1]), shutil.disk_usage(partial.parent).free
    if needed > free:
        raise CheckpointError(
            f"{partial.parent}: {free / 1e9:.2f} GB free, the teacher's predictions need "
            f"{needed / 1e9:.2f} GB. Lower cache.top_k, or set cache.folder to another disk."
        )
    partial.mkdir(parents=True)
    np.save(partial / "offsets.npy", offsets)
    for name, (number, dtype) in columns.items():
        with (partial / f"{name}.bin").open("wb") as file:
            file.truncate(int(offsets[-1]) * number * np.dtype(dtype).itemsize)
    (partial / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    (partial / DONE).write_text(json.dumps({"batches": 0}))
    return 0


def _columns(meta: Mapping[str, Any]) -> dict[str, tuple[int, Any]]:
    """Numbers per place and their type, by file."""
    return {
        "below": (meta["top_k"], _TYPES[meta["values"]]),
        "ids": (meta["top_k"], np.int32),
        "log_z": (len(meta["temperatures"]), np.float32),
        "nats": (1, np.float32),
    }


def _windows(
    teacher: Checkpoint, rows: Rows, batches: list[range], done: int
) -> Iterator[list[int]]:
    """The batches not done, so many at a time that their hidden states stay small."""
    if not batches:
        return
    width = int(getattr(teacher.config.get_text_config(), "hidden_size", 0) or 1024)
    tokens = sum(v.numel() for n, v in rows.__getitems__(batches[0]).items() if "input_ids" in n)
    each = max(1, WINDOW_BYTES // (width * teacher.dtype.itemsize * max(tokens, 1)))
    for at in range(done, len(batches), each):
        yield list(range(at, min(at + each, len(batches))))


def _outputs(teacher: Checkpoint, examples: list[Example]) -> Iterator[tuple[int, Tensor]]:
    """(number, logits [N, V]) of each batch: block by block where there are blocks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [_inputs(example) for example in examples]
    if any(name for name in teacher.blocks):
        walk = Walk(teacher, inputs, device=device, hidden_on_cpu=True)
        with closing(walk.run()) as outputs:  # type: ignore[type-var]
            for index, output in outputs:
                yield index, output.logits.flatten(0, 1)
        return
    model = load_model(teacher, device)
    with torch.no_grad():
        for index, one in enumerate(inputs):
            there = {name: value.to(device) for name, value in one.items()}
            yield index, model(**there, use_cache=False).logits.flatten(0, 1)


def _inputs(example: Example) -> Example:
    """As the student gets them: no labels, no mask where nothing is padded."""
    inputs = {name: value for name, value in example.items() if name != "labels"}
    if "attention_mask" in inputs and bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]
    return inputs


def _targets(example: Example, teacher: Checkpoint) -> Tensor:
    is_causal = not teacher.config.is_encoder_decoder
    return targets(example.get("labels", example["input_ids"]), is_causal).flatten()


def _predictions(logits: Tensor, target: Tensor, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a batch, by file."""
    dtype = getattr(torch, meta["values"])
    temperatures = tuple(meta["temperatures"])
    parts: dict[str, list[Tensor]] = {name: [] for name in _columns(meta)}
    places = (target != IGNORED).nonzero()[:, 0].to(logits.device)
    for at in places.split(max(1, CHUNK // logits.shape[-1])):
        z = logits[at].float()
        top = top_of(z, meta["top_k"], temperatures, dtype)
        chosen = target.to(z.device)[at][:, None]
        parts["below"].append(top.below.view(torch.int16) if dtype == torch.bfloat16 else top.below)
        parts["ids"].append(top.ids)
        parts["log_z"].append(torch.stack([top.log_z[t] for t in temperatures], 1))
        parts["nats"].append(z.logsumexp(-1, keepdim=True) - z.gather(-1, chosen))
    return {
        name: torch.cat(own).cpu().numpy() if own else np.zeros((0, 1), np.float32)
        for name, own in parts.items()
    }


def _write_at(path: Path, row: int, values: Any) -> None:
    with path.open("r+b") as file:
        file.seek(row * values.shape[1] * values.itemsize)
        file.write(np.ascontiguousarray(values).tobytes())


def examples_sha256(rows: Rows) -> str:
    """The hash of all examples."""
    digest = hashlib.sha256()
    for at in range(0, len(rows), 256):
        example = rows.__getitems__(range(at, min(at + 256, len(rows))))
        for name in sorted(example):
            digest.update(f"{name} {tuple(example[name].shape)}".encode())
            digest.update(example[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
