"""All that is measured of some checkpoints, in one run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from smelt.bench import decode, peak, prefill
from smelt.bench.decode import DecodeSettings, positions
from smelt.bench.file import Bench
from smelt.bench.flops import executed
from smelt.bench.neighbours import Watch
from smelt.bench.prefill import PrefillSettings
from smelt.bench.quiet import Doubt, Span, judge, too_small
from smelt.bench.records import CheckpointCost, DecodeStep, PrefillRun, machine
from smelt.bench.roofline import Roofline
from smelt.bench.room import check_room, weight_bytes
from smelt.bench.state import State
from smelt.bench.subjects import Subject, in_memory, subject
from smelt.checkpoint.source import Checkpoint

Report = Callable[[str, int, int], None]
Stages = Callable[[str], Report]

WHAT = ("decode", "prefill", "memory", "load")
"""What can be measured; `memory` and `load` are one process for each checkpoint."""
CONTEXTS, READ_CONTEXTS, LENGTHS = (0, 512), (128, 512), (128, 512)
"""Where none is asked for: of the cache, of an encoder's text, of a prefill."""
_TOKENS = 64
"""Of the step whose FLOPs are those of a token: their experts differ in factored form."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured of which sizes; None: the defaults, where the positions reach."""

    what: tuple[str, ...] = WHAT
    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    shared: decode.DecodeSettings = field(default_factory=DecodeSettings)  # but for the sizes


def measure(
    sources: Sequence[str],
    settings: BenchSettings,
    *,
    trust_remote_code: bool = False,
    stages: Stages = lambda stage: lambda block, done, total: None,
) -> Bench:
    """Everything that is asked for, of every checkpoint.

    Raises:
        SmeltError: numbers that cannot be, a checkpoint that cannot be loaded, or that the memory
            has no room for; before anything is measured.
    """
    checkpoints = [Checkpoint.open(s, trust_remote_code=trust_remote_code) for s in sources]
    steps, texts = _sizes(checkpoints, settings)
    is_timed = bool(checkpoints and {"decode", "prefill"} & set(settings.what))
    for checkpoint in checkpoints:
        checkpoint.check()
    check_room(checkpoints, steps.dtype, steps.device, is_timed=is_timed)
    names = shortest_names([str(checkpoint.folder) for checkpoint in checkpoints])
    watch = Watch()
    about = machine(steps.threads, steps.device)
    costs = [_on_disk(c, n, steps) for c, n in zip(checkpoints, names, strict=True)]
    if {"memory", "load"} & set(settings.what):
        costs = _loaded(checkpoints, costs, steps, texts, settings.what, stages("loading"))
    found: tuple[list[DecodeStep], list[PrefillRun]] = ([], [])
    roofline = None
    if is_timed:
        subjects = _subjects(checkpoints, names, steps, stages("reading weights"))
        costs = [_with_sizes(cost, one) for cost, one in zip(costs, subjects, strict=True)]
        rows = [*steps.batches, *(texts.batch * n for n in texts.lengths)]
        roofline = Roofline(steps.dtype, steps.device, rows, always=steps.turns)
        found = _timed(subjects, steps, texts, settings.what, roofline, stages)
    cells = [*found[0], *found[1]]
    verdict = judge([Doubt(c.spread, c.waiting) for c in cells], watch.seen())
    return Bench(
        machine=about,
        rates=roofline.wall if roofline else None,
        processor_rates=roofline.processor if roofline else None,
        quiet=verdict.to_dict(),
        checkpoints=costs,
        decode=found[0],
        prefill=found[1],
        warnings=[f"not quiet: {r}" for r in verdict.reasons] + too_small(_spans(*found)),
        settings=_described(settings, steps, texts),
    )


def _sizes(
    checkpoints: Sequence[Checkpoint], settings: BenchSettings
) -> tuple[DecodeSettings, PrefillSettings]:
    """The settings of both timings, checked; sizes that nobody gave are those that fit."""
    limits = [limit for c in checkpoints if (limit := positions(c.config)) is not None]
    reads = any(c.config.is_encoder_decoder for c in checkpoints)
    contexts, lengths = settings.contexts, settings.lengths
    if contexts is None:
        contexts = _fitting(READ_CONTEXTS if reads else CONTEXTS, limits, 1)
    if lengths is None:
        lengths = _fitting(LENGTHS, limits, 0)
    steps = replace(settings.shared, batches=settings.batches, contexts=contexts)
    fields = ("turns", "skip_alpha", "dtype", "device", "threads", "seed")
    texts = PrefillSettings(**{n: getattr(steps, n) for n in fields}, lengths=lengths)
    decode.check(steps)
    prefill.check(texts)
    named = [(c.folder.name, c.config) for c in checkpoints]
    decode.check_contexts(named, steps)
    prefill.check_lengths(named, texts)
    return steps, texts


def _fitting(sizes: Iterable[int], limits: Sequence[int], room: int) -> tuple[int, ...]:
    """The sizes, none beyond what the fewest positions leave room for."""
    most = min(limits, default=1 << 30) - room
    return tuple(sorted({min(size, most) for size in sizes}))


def _on_disk(checkpoint: Checkpoint, name: str, steps: DecodeSettings) -> CheckpointCost:
    files = checkpoint.folder.glob("*.safetensors")
    dtype = steps.dtype
    return CheckpointCost(
        checkpoint=name,
        fingerprint=checkpoint.fingerprint,
        folder_bytes=sum(file.stat().st_size for file in files),
        dtype=str(dtype).removeprefix("torch."),
        parameters=weight_bytes(checkpoint, dtype) // dtype.itemsize,
    )


def _loaded(
    checkpoints: Sequence[Checkpoint],
    costs: Sequence[CheckpointCost],
    steps: DecodeSettings,
    texts: PrefillSettings,
    what: Sequence[str],
    progress: Report,
) -> list[CheckpointCost]:
    """The costs with seconds and memory of a process of each checkpoint's own."""
    runs = {"batch": max(steps.batches), "context": max(steps.contexts)}
    runs["length"] = max(texts.lengths)
    if "memory" not in what:
        runs = dict.fromkeys(runs, 0)
    found = []
    for done, (checkpoint, cost) in enumerate(zip(checkpoints, costs, strict=True), 1):
        job = peak.Job(
            source=str(checkpoint.folder),
            dtype=cost.dtype,
            device=str(steps.device),
            threads=steps.threads,
            trust_remote_code=checkpoint.trust_remote_code,
            **runs,
        )
        values = asdict(peak.measure(job))
        if "memory" not in what:
            values = {"load_seconds": values["load_seconds"]}
        else:
            values["peak_of"] = runs
        found.append(replace(cost, **values))
        progress(cost.checkpoint, done, len(costs))
    return found


def _subjects(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    steps: DecodeSettings,
    progress: Report,
) -> list[Subject]:
    found = []
    for done, (checkpoint, name) in enumerate(zip(checkpoints, names, strict=True), 1):
        model = in_memory(checkpoint, steps.dtype, steps.device)
        found.append(subject(model, name, checkpoint.fingerprint))
        progress(name, done, len(names))
    return found


@torch.inference_mode()
def _with_sizes(cost: CheckpointCost, one: Subject) -> CheckpointCost:
    """The costs with what the modules tell: active parameters, FLOPs of a token."""
    device = next(one.model.parameters()).device
    vocabulary = one.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (_TOKENS, 1), generator=generator).to(device)
    one.choose()
    read = int(one.model.config.is_encoder_decoder)  # an encoder cannot read nothing
    state = State(one.model, tokens[:1, :read], _TOKENS)
    flops, _ = executed(one.model, lambda: state.step(tokens))
    return replace(
        cost,
        flops_per_token=flops / _TOKENS,
        active_parameters=None if one.cost is None else one.cost.active_params,
    )


def _timed(
    subjects: Sequence[Subject],
    steps: DecodeSettings,
    texts: PrefillSettings,
    what: Sequence[str],
    roofline: Roofline,
    stages: Stages,
) -> tuple[list[DecodeStep], list[PrefillRun]]:
    decoded: list[DecodeStep] = []
    if "decode" in what:
        decoded = decode.measure(subjects, steps, stages("decoding"), roofline).steps
    read = []
    if "prefill" in what:
        read = prefill.measure(subjects, texts, roofline, stages("prefill"))
    return decoded, read


def _spans(steps: Sequence[DecodeStep], texts: Sequence[PrefillRun]) -> dict[str, list[Span]]:
    """By checkpoint, the times and floors of its cells: the processor's, where there is one."""
    found: dict[str, list[Span]] = {}
    named = [
        *((f"decode, batch {s.batch}, context {s.context},", s) for s in steps),
        *((f"prefill, length {p.length},", p) for p in texts),
    ]
    for name, one in named:
        ms, ratio, unit = one.ms, one.ratio, "ms"
        if one.threads == 1 and one.processor_ratio:
            ms, ratio, unit = one.processor_ms, one.processor_ratio, "ms of processor time"
        if ratio:
            found.setdefault(one.checkpoint, []).append(Span(name, ms, ms / ratio, unit))
    return found


def _described(
    settings: BenchSettings, steps: DecodeSettings, texts: PrefillSettings
) -> dict[str, Any]:
    return {
        "what": settings.what,
        "batches": steps.batches,
        "contexts": steps.contexts,
        "lengths": texts.lengths,
        "turns": steps.turns,
        "steps": steps.steps,
        "dtype": str(steps.dtype).removeprefix("torch."),
        "device": str(steps.device),
        "threads": steps.threads,
        "skip_alpha": steps.skip_alpha,
        "seed": steps.seed,
    }


def shortest_names(sources: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that differ: b, or a/seed-0 where there is c/seed-0 too."""
    parts = [Path(source).expanduser().resolve().parts for source in sources]
    for length in range(1, max(map(len, parts), default=0)):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return list(sources)  # the same one twice: a control
