"""How well a GGUF file predicts a text, run by llama.cpp on the tokens that its source is run on.

The text is cut by the source's tokenizer, so that a file and its source are measured on the same
predicted tokens, sequence by sequence. The file's own tokens are held against that tokenizer's.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from smelt.checkpoint.inputs import Batch, make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import Progress
from smelt.compress.inputs import read_text
from smelt.compress.pipeline import Stages, silent
from smelt.errors import CalibrationError, CheckpointError
from smelt.evaluate.compare import Compared
from smelt.evaluate.evaluation import Evaluation
from smelt.evaluate.perplexity import Perplexity, batch_nats
from smelt.evaluate.results import Result, Setting, record
from smelt.evaluate.sequences import PerSequence
from smelt.export.engine import Engine, library, version
from smelt.export.gguf_file import GgufFile
from smelt.export.tokens import token_list
from smelt.recipe import CalibrationRecipe


def open_files(paths: Sequence[Path], source: Checkpoint | None) -> list[GgufFile]:
    """GGUF files opened, checked for what would stop their measurement later.

    Args:
        source: the checkpoint whose tokenizer is to cut the text.

    Raises:
        CalibrationError: no checkpoint whose tokenizer could cut the text.
        CheckpointError: a file of other tokens than the checkpoint's.
        EngineError: no llama.cpp here.
    """
    library()
    files = [GgufFile(path) for path in paths]
    if source is None:
        raise CalibrationError(
            f"{paths[0].name}: a GGUF file is measured on its source's tokens. Name the "
            "checkpoint that it was made from before it: smelt evaluate SRC FILE.gguf."
        )
    rows = source.config.get_text_config().vocab_size
    for file in files:
        own = file.get("tokenizer.ggml.tokens")
        same = len(own) == rows if own is not None else True
        if own is not None and list(own) != token_list(source.tokenizer, rows):
            same = False
        if not same:
            raise CheckpointError(
                f"{file.path}: its tokens are not those of {source.folder.name}. Name the "
                "checkpoint that it was made from, or one of the same tokenizer."
            )
    return files


def measure_files(
    files: Sequence[GgufFile],
    names: Sequence[str],
    source: Checkpoint,
    recipe: CalibrationRecipe,
    *,
    first: Perplexity | None = None,
    stages: Stages = silent,
) -> Evaluation:
    """The loss of GGUF files on one text, and their bytes.

    Args:
        names: what to call the files.
        source: whose tokenizer cuts the text.
        first: what the files are compared with, sequence by sequence.
    """
    blocks = read_text(source, recipe)
    batches = make_batches(source, blocks, recipe.batch_size, recipe.seed)
    setting = Setting(recipe.text, blocks.sha256, recipe.seed, "cpu")
    found = Evaluation()
    for file, name in zip(files, names, strict=True):
        loss = measure_file(file, batches, blocks.num_bytes, progress=stages(name))
        more = None if first is None else loss.sequences.minus(first.sequences)
        found.compared.append(Compared(name, loss, more))
        found.fidelity.append(None)
        found.results.extend(_named(one) for one in loss.records(file, setting))
        found.results.append(_named(size_of(file, setting)))
    return found


def measure_file(
    file: GgufFile, batches: Sequence[Batch], num_bytes: int, *, progress: Progress | None = None
) -> Perplexity:
    """The loss of one file on the batches, a sequence at a time.

    Args:
        batches: with targets; padding behind the real tokens of a sequence only.
        num_bytes: UTF-8 bytes of the text of all real tokens.

    Raises:
        CheckpointError: the file has fewer positions than a sequence tokens, or gives NaN or Inf.
    """
    longest = max(int(batch.mask.sum(1).max()) for batch in batches)
    if longest > file.context_length:
        raise CheckpointError(
            f"{file.path}: sequences of {longest} tokens, and the model has "
            f"{file.context_length} positions. Set sequence_length."
        )
    parts, total = [], sum(len(batch.mask) for batch in batches)
    with Engine(file.path, context=longest) as engine:
        for batch in batches:
            assert batch.labels is not None
            for ids, mask, labels in zip(
                batch.inputs["input_ids"], batch.mask, batch.labels, strict=True
            ):
                count = int(mask.sum())
                logits = torch.from_numpy(engine.logits(ids[:count].tolist()))
                parts.append(batch_nats(logits[None], labels[None, :count]))
                if progress:
                    progress("llama.cpp", len(parts), total)
    sequences = PerSequence.join(parts)
    if not bool(torch.isfinite(sequences.total).all()):
        raise CheckpointError(f"{file.path}: llama.cpp gives NaN or Inf. The file is damaged.")
    real = sum(int(batch.mask.sum()) for batch in batches)
    return Perplexity(sequences, num_bytes * sequences.num_tokens / real)


def size_of(file: GgufFile, setting: Setting) -> Result:
    """The bytes of a file, as a record."""
    return record(
        file, setting, task="size", metric="bytes on disk", value=float(file.num_bytes), n=1
    )


def _named(result: Result) -> Result:
    """A record that names the llama.cpp it was made with."""
    return replace(result, versions={**result.versions, "xllamacpp": version()})
