"""Compression while the model is walked: groups decided, and layers fitted, on the way.

Sequential decisions: the budget is fixed by the one-shot plan, and a layer's groups are decided on
the stream of the compressed layers before it. Reconstruction: what is kept of a layer is fitted to
what the layer did, with inputs from the original stream, the compressed one, or both in step. A
killed run walks again and does only what is missing: the same bytes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from smelt import processes
from smelt.checkpoint.bind import MoeLayer
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.observe import lift_capacity
from smelt.checkpoint.sink import Sink
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Stage, Walk
from smelt.compress.align import Aligner
from smelt.compress.apply import check_plan, decided, finish, run_key, stage_names, stage_tensors
from smelt.compress.auto import Chooser
from smelt.compress.calibrate import Collector, Progress, RoutingStats, last_block
from smelt.compress.capture import Capture, adds_up
from smelt.compress.decide import regroup
from smelt.compress.done import Done
from smelt.compress.factoring import is_decided
from smelt.compress.facts import Facts
from smelt.compress.known import Known
from smelt.compress.layer import Changed, Compressor
from smelt.compress.plan import LayerPlan, Plan, is_changed
from smelt.compress.reconstructor import Reconstructor, check_alone, check_runs_alone
from smelt.compress.sample import LayerSample, alone
from smelt.compress.twin import Twin
from smelt.errors import PlanError
from smelt.recipe import ReconstructRecipe

_DTYPES = {"model": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def apply_walking(
    checkpoint: Checkpoint,
    plan: Plan,
    destination: str | Path,
    *,
    batches: Sequence[Batch],
    stats: RoutingStats,
    facts: Facts,
    documents: Mapping[str, str] | None = None,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint of a plan that is sequential or reconstructs; returns its folder.

    Args:
        batches: the calibration text, walked again.
        stats: the one-shot statistics that the plan's budget came from.
    """
    check_plan(checkpoint, plan, stats)
    checkpoint.check()
    if plan.recipe.reconstruct is not None:
        check_runs_alone(facts)
    key = "walking " + run_key(checkpoint, plan)
    size = plan.predicted.bytes_after
    sink = processes.in_turn(lambda: Sink(destination, checkpoint, key=key, num_bytes=size))
    with Aligner(workers) as aligner:
        compressor = Compressor(checkpoint, facts, plan, aligner, stats.fisher)
        if not is_decided(plan):
            # One after the other: the later ones find what the first has decided.
            compressor.plan = processes.in_turn(lambda: decided(compressor, sink, stats))
        run = _Walking(compressor, sink, stats, batches, device, progress)
        try:
            layers = run.through()
        except PlanError:  # such as a family whose layers cannot be fitted
            if processes.is_first():
                sink.abandon()
            raise
    final = compressor.plan.model_copy(update={"layers": layers})
    if processes.is_first():
        finish(sink, checkpoint, facts, final, len(run.stages), documents or {})
    processes.wait()
    return sink.destination


class _Walking:
    """One walk of a checkpoint, in which its compression is written block by block."""

    def __init__(
        self,
        compressor: Compressor,
        sink: Sink,
        stats: RoutingStats,
        batches: Sequence[Batch],
        device: str,
        progress: Progress | None,
    ) -> None:
        self.compressor = compressor
        self.checkpoint, self.facts = compressor.checkpoint, compressor.facts
        self.plan, self.sink = compressor.plan, sink
        self.recipe = self.plan.recipe.reconstruct
        self.is_sequential = self.plan.method.sequential
        self.progress = progress
        self.stages = stage_names(self.checkpoint)
        self.last = last_block(self.facts.anatomy.layers, self.stages)
        target = None if self.recipe is None else self.recipe.target or "corrected"
        self.is_compressed_stream = self.is_sequential or target != "layer"
        own = [batches[index] for index in processes.share(len(batches))]
        count = len(own)
        # Both streams in step: the batches, and the batches again.
        self.original = range(count) if target == "corrected" else range(0)
        self.stream = range(len(self.original), len(self.original) + count)
        inputs = [b.inputs for b in own] * (2 if self.original else 1)
        self.walk = Walk(self.checkpoint, inputs, device=device)
        self.twin = Twin(self.checkpoint, self.facts, self.plan)
        self.done = Done(sink, self.stages, keeps_tensors=self.is_compressed_stream)
        self.written: set[str] = set()
        self.layers: dict[str, LayerPlan] = {layer.name: layer for layer in self.plan.layers}
        self.layer_of = {layer.name: layer for layer in self.facts.anatomy.layers}
        self.collector = None
        if self.is_sequential:
            self.collector = _collector(self.plan, stats, self.facts, batches)
        self.known = Known(self.checkpoint, self.facts, self.plan, stats)
        self.chooser: Chooser | None = None
        if self.recipe is not None:
            self.capture = _capture(self.recipe, self.facts, batches)
            self.reconstructor = Reconstructor(
                self.checkpoint,
                self.facts,
                self.plan,
                self.recipe,
                device=self.walk.device,
                reduce=alone if processes.num_processes() == 1 else processes.add_up,
            )
            if self.plan.recipe.method == "auto":
                self.chooser = Chooser(compressor, self.reconstructor, self.known.evidence)

    def through(self) -> tuple[LayerPlan, ...]:
        """Walk, and write every shard; returns the layers as they were decided."""
        visit = self._on_compressed if self.is_compressed_stream else self._on_original
        for _ in self.walk.run(visit, until=self.last):
            raise AssertionError("the walk ends before any output")
        for name in self.stages:  # what the walk did not reach: later blocks, those of images
            if name not in self.written:
                self._write(name, [])
        return tuple(self.layers.values())

    @contextlib.contextmanager
    def _on_original(self, stage: Stage) -> Iterator[None]:
        """Around a block of the original stream: it runs as it is, then its layers are fitted."""
        if self._is_done(stage) or not (layers := self._fittable(stage)):
            yield
            self._write(stage.name, self._recalled(stage) or self._compressed(stage, {}))
            return
        with self.capture.watching(stage, layers) as caught:
            yield
        samples = self._samples(stage, caught)
        with self._without_experts(stage, is_over=True):
            changed = self._fitted(stage, self._compressed(stage, samples), samples)
            self._write(stage.name, changed)

    @contextlib.contextmanager
    def _on_compressed(self, stage: Stage) -> Iterator[None]:
        """Around a block of the compressed stream: its layers are decided and fitted before it."""
        with contextlib.ExitStack() as stack:
            for layer in self._here(stage):  # no token is dropped, as in calibration
                stack.callback(lift_capacity(stage.walk.model, layer))
                stack.callback(lift_capacity(self.twin.model, layer))
            changed = self._recalled(stage) or self._decided_and_fitted(stage)
            self._write(stage.name, changed)
            stack.enter_context(self.twin.running(stage, changed, self.stream))
            yield

    def _decided_and_fitted(self, stage: Stage) -> list[Changed]:
        layers = self._fittable(stage)
        self.known.found.clear()
        with contextlib.ExitStack() as stack:
            if self.collector is not None:
                stack.enter_context(self.collector.watching(stage))
            caught = stack.enter_context(self.capture.watching(stage, layers)) if layers else {}
            if layers and self.original:
                here = self.capture.outputs(stage, layers[-1], self.stream)
            else:
                stage.replay(self.stream)
        if self.collector is not None:
            for layer in self._here(stage):
                found = self.collector.of_all_processes([layer.name])[layer.name]
                self.known.found[layer.name] = found
                if self.chooser is None:
                    evidence = self.known.evidence(layer.name)
                    self.layers[layer.name] = regroup(
                        self.plan.layer(layer.name), evidence, self.plan.recipe
                    )
        if not layers:
            return self._compressed(stage, {})
        samples = self._samples(stage, caught)
        if self.original:
            last = layers[-1]
            if adds_up(stage, last, self.stream[0]):
                wanted = self.capture.outputs(stage, last, self.original)
                samples[last.name] = samples[last.name].corrected(here, wanted)
            elif self.recipe is not None and self.recipe.target is not None:
                raise PlanError(
                    f"reconstruct.target = corrected: block {stage.name} does not add its experts' "
                    "output to its own as it is, so what the layer should give cannot be told "
                    "from the block's output. Use target: sequential."
                )
        with self._without_experts(stage, is_over=False):
            return self._fitted(stage, self._compressed(stage, samples), samples)

    def _samples(
        self, stage: Stage, caught: dict[str, list[tuple[Tensor, Tensor]]]
    ) -> dict[str, LayerSample]:
        """What was caught of each layer as a sample; what it is made of is given up."""
        samples = {}
        for name in list(caught):
            layer = self.layer_of[name]
            samples[name] = self.capture.sample(layer, caught.pop(name))
            check_alone(stage.walk.model, layer, samples[name], self.checkpoint.dtype)
        return samples

    @contextlib.contextmanager
    def _without_experts(self, stage: Stage, *, is_over: bool) -> Iterator[None]:
        """Within: the walk gives up the memory of the block's experts, for the fit to use.

        Args:
            is_over: the block has run; else its experts are read again.
        """
        names = [n for layer in self._here(stage) for n in self.facts.anatomy.experts[layer.name]]
        self.walk.unload(names)
        yield
        if not is_over:
            self.walk.load(names)

    def _here(self, stage: Stage) -> list[MoeLayer]:
        return self.facts.anatomy.layers_of(stage.name)

    def _fittable(self, stage: Stage) -> list[MoeLayer]:
        """The layers of a block that are fitted: those that lose something, where any are."""
        if self.recipe is None:
            return []
        return [layer for layer in self._here(stage) if is_changed(self.layers[layer.name])]

    def _compressed(self, stage: Stage, samples: Mapping[str, LayerSample]) -> list[Changed]:
        """What becomes of each layer of a block, not fitted yet."""
        found = []
        for layer in self._here(stage):
            plan = self.layers[layer.name]
            if self.chooser is not None and layer.name in samples:
                self.layers[layer.name], made = self.chooser.choose(
                    layer, plan, samples[layer.name]
                )
            else:
                made = self.compressor.compress(layer, plan, self.known.stats(layer.name))
            found.append(made)
        return found

    def _fitted(
        self, stage: Stage, changed: list[Changed], samples: dict[str, LayerSample]
    ) -> list[Changed]:
        """The same with the layers that there are samples of fitted to them."""
        fitted = []
        for layer, one in zip(self._here(stage), changed, strict=True):
            if layer.name in samples:
                self.layers[layer.name], one = self.reconstructor.fit(
                    layer, self.layers[layer.name], one, samples.pop(layer.name)
                )
            fitted.append(one)
        if processes.is_first():
            layers = [self.layers[layer.name] for layer in self._here(stage)]
            self.done.note(stage.name, layers, fitted)
        return fitted

    def _recalled(self, stage: Stage) -> list[Changed] | None:
        """What a killed run had made of this block already."""
        if not self._is_done(stage):
            return None
        known = self.done.read(stage.name)
        assert known is not None
        self.layers.update({layer.name: layer for layer in known.layers})
        return [known.changed]

    def _is_done(self, stage: Stage) -> bool:
        """Whether a killed run had fitted this block; all processes hear the same."""
        return processes.by_the_first(lambda: self.done.read(stage.name) is not None)

    def _write(self, name: str, changed: list[Changed]) -> None:
        index, count = self.stages.index(name), len(self.stages)
        if processes.is_first() and not self.sink.has(index, count):
            tensors = stage_tensors(self.checkpoint, self.facts, self.plan, name, changed)
            self.sink.write(index, count, tensors)
        self.written.add(name)
        if self.progress:
            self.progress(name or "the rest", len(self.written), count)


def _collector(
    plan: Plan, stats: RoutingStats, facts: Facts, batches: Sequence[Batch]
) -> Collector:
    """Takes the statistics of the compressed stream, as the one-shot ones were taken."""
    sample = max(len(layer.input_sample) for layer in stats.layers.values())
    seed = plan.recipe.calibration.seed
    return Collector(facts.anatomy.layers, batches, sample, seed, input_gram=False)


def _capture(recipe: ReconstructRecipe, facts: Facts, batches: Sequence[Batch]) -> Capture:
    return Capture(
        batches,
        facts.anatomy.layers,
        tokens=recipe.tokens,
        held_out=recipe.held_out,
        dtype=_DTYPES[recipe.states],
    )
