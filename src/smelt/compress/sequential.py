"""Sequential compression: a layer's groups are decided on the stream of the compressed ones.

The budget is fixed by the one-shot plan. The walk stops at a block, watches it on the compressed
stream, decides its groups anew, writes it, and goes on through the compressed block. A killed run
walks again and writes only what is missing: the same bytes, for the time of the forward.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from smelt.checkpoint import mapped, skeleton
from smelt.checkpoint.anatomy import resized
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.sink import Sink
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Stage, Walk, put
from smelt.checkpoint.width import hidden_field, with_field
from smelt.compress.align import Aligner
from smelt.compress.apply import (
    check_plan,
    finish,
    new_config,
    run_key,
    stage_names,
    stage_tensors,
)
from smelt.compress.calibrate import Collector, Progress, RoutingStats, last_block
from smelt.compress.decide import layer_seed, regroup
from smelt.compress.facts import Facts, bank_reader, router_reader
from smelt.compress.layer import Changed, Compressor
from smelt.compress.plan import LayerPlan, Plan
from smelt.compress.similarity import Evidence
from smelt.routing import LayerStats


def apply_sequentially(
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
    """Write the checkpoint of a plan, its groups decided layer by layer; returns its folder.

    Args:
        batches: the calibration text, walked again.
        stats: the one-shot statistics that the plan's budget came from.
    """
    check_plan(checkpoint, plan, stats)
    checkpoint.check()
    key = "sequential " + run_key(checkpoint, plan)
    sink = Sink(destination, checkpoint, key=key, num_bytes=plan.predicted.bytes_after)
    stages = stage_names(checkpoint)
    last = last_block(facts.anatomy.layers, stages)
    decided: dict[str, LayerPlan] = {}
    twin = _twin(checkpoint, facts, plan)
    sample = max(len(layer.input_sample) for layer in stats.layers.values())
    seed = plan.recipe.calibration.seed
    collector = Collector(facts.anatomy.layers, batches, sample, seed, input_gram=False)
    walk = Walk(checkpoint, [b.inputs for b in batches], device=device)
    decide = _decider(checkpoint, facts, plan)

    def write(name: str, changed: list[Changed]) -> None:
        index = stages.index(name)
        if not sink.has(index, len(stages)):
            tensors = stage_tensors(checkpoint, facts, plan, name, changed)
            sink.write(index, len(stages), tensors)
        if progress:
            progress(name or "the rest", index + 1, len(stages))

    with Aligner(workers) as aligner:
        compressor = Compressor(checkpoint, facts, plan, aligner, stats.fisher)

        @contextlib.contextmanager
        def visit(stage: Stage) -> Iterator[None]:
            with collector.watching(stage):
                stage.replay()
            changed = []
            for layer in facts.anatomy.layers_of(stage.name):
                new = collector.stats.pop(layer.name)
                now = decide(layer.name, new)
                decided[layer.name] = now
                changed.append(compressor.compress(layer, now, new))
            write(stage.name, changed)
            with _running_as(stage, twin, changed):
                yield

        for _ in walk.run(visit, until=last):
            raise AssertionError("the walk ends before any output")
    for name in stages[stages.index(last) + 1 :]:
        write(name, [])
    layers = tuple(decided.get(layer.name, layer) for layer in plan.layers)
    final = plan.model_copy(update={"layers": layers})
    return finish(sink, checkpoint, facts, final, len(stages), documents or {})


def _decider(
    checkpoint: Checkpoint, facts: Facts, plan: Plan
) -> Callable[[str, LayerStats], LayerPlan]:
    """Decides a layer anew, by its name and its statistics on the compressed stream."""
    banks, routers = bank_reader(checkpoint, facts), router_reader(checkpoint, facts)
    positions = {layer.name: i for i, layer in enumerate(plan.layers)}

    def decide(name: str, stats: LayerStats) -> LayerPlan:
        seed = layer_seed(plan.recipe.seed, positions[name])
        evidence = Evidence(stats, partial(banks, name), routers(name), seed)
        return regroup(plan.layer(name), evidence, plan.recipe)

    return decide


def _twin(checkpoint: Checkpoint, facts: Facts, plan: Plan) -> PreTrainedModel:
    """A skeleton of the result, whose blocks run in the place of the source's."""
    if plan.form == "expanded":
        return checkpoint.skeleton()
    if plan.form == "mapped":
        config = mapped.SmeltMappedConfig.from_dict(new_config(checkpoint, facts, plan))
        return skeleton.build(mapped.model_class(config), config, checkpoint.dtype)
    before, after = plan.layers[0].num_experts, plan.layers[0].num_groups
    config = resized(checkpoint.config, before, after)
    if (units := plan.layers[0].hidden_units) is not None:
        layers, whole = facts.anatomy.layers, facts.layers[0].hidden_size
        config = with_field(config, hidden_field(checkpoint, layers, whole, units), units)
    return skeleton.build(checkpoint.cls, config, checkpoint.dtype)


@contextlib.contextmanager
def _running_as(stage: Stage, twin: PreTrainedModel, changed: list[Changed]) -> Iterator[None]:
    """Within: the stage's module runs with its compressed layers."""
    new = {name: tensor for c in changed for name, tensor in c.tensors.items()}
    block = twin.get_submodule(stage.name)
    meta = dict(block.named_parameters())
    device = stage.walk.device
    own = stage.module.state_dict()
    for name in block.state_dict():
        path = f"{stage.name}.{name}"
        value = new[path] if path in new else own[name]
        put(twin, path, value, device)
    try:
        with stage.runs_as(block.forward):
            yield
    finally:
        for name, param in meta.items():
            owner, _, leaf = name.rpartition(".")
            block.get_submodule(owner)._parameters[leaf] = param
