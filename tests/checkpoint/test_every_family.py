"""Every experts class that transformers has with the common contract: all but a named few work."""

import inspect
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

import checkpoints
import every_family
from end_to_end import batches_of, compress, logits_of
from every_family import ExpertsClass
from smelt.checkpoint import mapped
from smelt.checkpoint.bind import MoeLayer, find_layers
from smelt.checkpoint.families import NOT_COVERED
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Walk
from smelt.compress.calibrate import Collector, RoutingStats, calibrate
from smelt.compress.facts import read_facts
from smelt.compress.pipeline import run_plan
from smelt.compress.plan import Plan
from smelt.compress.walking import apply_walking
from smelt.errors import CheckpointError, PlanError
from smelt.recipe import CompressRecipe

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
CLASSES = every_family.experts_classes()
BY_NAME = {each.name: each for each in CLASSES}
WORKING = [name for name in BY_NAME if name not in every_family.NOT_WORKING]


def tiny_model(experts: ExpertsClass) -> PreTrainedModel:
    """A random model that holds experts of this class."""
    for cls in experts.models():
        config = every_family.tiny_config(cls.config_class)
        with torch.device("meta"):
            modules = cls(config).modules()
        if any(type(module).__name__ == experts.name for module in modules):
            model = cls(config).eval()
            checkpoints.randomise(model)
            return model
    raise AssertionError(f"no model of {experts.module} holds {experts.name}")


@pytest.mark.parametrize("name", WORKING)
def test_a_family_with_the_contract_works_end_to_end(name: str, tmp_path: Path) -> None:
    mapped.register()
    model = tiny_model(BY_NAME[name])
    model.save_pretrained(tmp_path / "source")
    plain = type(model).from_pretrained(tmp_path / "source").eval()
    checkpoint = Checkpoint.open(tmp_path / "source")
    checkpoint.check()
    facts = read_facts(checkpoint)
    for layer in facts.anatomy.layers:
        agrees_with_its_router(layer, plain)

    inputs = [checkpoints.random_inputs(checkpoint.config, seed=seed) for seed in (0, 1)]
    batches = batches_of(inputs)
    collector = Collector(facts.anatomy.layers, batches, 10, 0, input_gram=False)
    for index, output in Walk(checkpoint, inputs).run(collector.watching):
        expected = logits_of(plain, inputs[index])
        torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)

    stats = calibrate(checkpoint, batches, text="t", sample_tokens=100)
    stock, plan = compress(
        checkpoint, stats, facts, tmp_path / "stock", {"form": "stock", "experts": 4}
    )
    small, info = type(model).from_pretrained(stock, output_loading_info=True)
    assert not any(info.values()), info
    assert {layer.num_experts for layer in find_layers(small)} == {4}
    assert logits_of(small.eval(), inputs[0]).isfinite().all()
    written = Checkpoint.open(stock)
    assert plan.predicted.bytes_after == sum(t.num_bytes for t in written.tensors.values())

    if name not in every_family.NOT_FITTED:
        fitted_on(checkpoint, stats, batches, tmp_path / "fitted")
    else:
        with pytest.raises(PlanError, match="Leave reconstruct out"):
            fitted_on(checkpoint, stats, batches, tmp_path / "fitted")
        assert not (tmp_path / "fitted.partial").exists()
        settings = {"experts": 4, "method": "reap", "reconstruct": {"inputs": "sample"}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*numbers for each")
            with pytest.raises(PlanError, match="Leave reconstruct out"):
                compress(checkpoint, stats, facts, tmp_path / "sampled", settings)
        assert not (tmp_path / "sampled.partial").exists()

    if name not in every_family.STOCK_ONLY:
        settings = {"experts": 4, "method": "m-smoe"}
        folders = [
            compress(checkpoint, stats, facts, tmp_path / form, {"form": form, **settings})[0]
            for form in ("mapped", "expanded")
        ]
        few, all_ = (Checkpoint.open(folder).cls.from_pretrained(folder) for folder in folders)
        found, expected = (logits_of(each.eval(), inputs[0]) for each in (few, all_))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def fitted_on(
    checkpoint: Checkpoint, stats: RoutingStats, batches: Sequence[Batch], folder: Path
) -> None:
    """Half the experts, fitted for a few steps: no layer is further from what it did."""
    facts = read_facts(checkpoint)
    settings = {"experts": 4, "method": "reap", "reconstruct": {"steps": 8, "batch_tokens": 64}}
    recipe = CompressRecipe(source=str(checkpoint.folder), output=str(folder), **settings)
    plan = run_plan(checkpoint, stats, recipe, facts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*numbers for each")
        apply_walking(checkpoint, plan, folder, batches=batches, stats=stats, facts=facts)
    fits = [layer.fit for layer in Plan.load(folder / "smelt" / "plan.json").layers]
    assert all(fit is not None and fit.after <= fit.before for fit in fits)


def test_a_token_that_wants_no_expert_counts_for_none(tmp_path: Path) -> None:
    """Zaya's router may choose to skip: it passes expert 0 with weight 0."""
    model = tiny_model(BY_NAME["ZayaExperts"])
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer[-1] = 10.0
    model.save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    batches = batches_of([checkpoints.random_inputs(checkpoint.config)])
    stats = calibrate(checkpoint, batches, text="t", sample_tokens=10)
    assert stats.layers
    for layer in stats.layers.values():
        assert layer.num_tokens == 48
        assert not layer.count.any()


def agrees_with_its_router(layer: MoeLayer, model: PreTrainedModel) -> None:
    """What is said of the scores and groups of a layer is what its router's source does."""
    assert layer.router is not None
    router = model.get_submodule(layer.router)
    source = inspect.getsource(type(router))
    kinds = {kind for kind in ("softmax", "sigmoid") if kind in source}
    if len(kinds) == 1 and "topk_method" not in source:
        assert layer.is_softmax == ("softmax" in kinds)
    limits = "self.num_group" in source and getattr(router, "topk_method", "") != "greedy"
    assert (layer.n_group, layer.min_per_group) == ((2, 2) if limits else (1, 1))


@pytest.mark.parametrize("name", sorted(every_family.STOCK_ONLY))
def test_a_family_that_the_mapped_form_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    mapped.register()
    model = tiny_model(BY_NAME[name])
    model.save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    facts = read_facts(checkpoint)
    batches = batches_of([checkpoints.random_inputs(checkpoint.config)])
    stats = calibrate(checkpoint, batches, text="t", sample_tokens=100)
    with pytest.raises(CheckpointError, match="mapped form"):
        compress(checkpoint, stats, facts, tmp_path / "out", {"form": "mapped", "experts": 4})
    assert not (tmp_path / "out").exists()


def test_at_least_fifty_classes_work_and_the_rest_are_named() -> None:
    rest = {name: reason for name, reason in every_family.NOT_WORKING.items() if name in BY_NAME}
    assert set(rest) == set(every_family.NOT_WORKING), "a class named here is gone from the library"
    assert all(rest.values())
    assert len(WORKING) >= 50, f"{len(WORKING)} of {len(CLASSES)} work; not: {rest}"


@pytest.mark.parametrize("kind", sorted(NOT_COVERED))
def test_a_family_outside_the_contract_is_refused_with_its_reason(kind: str) -> None:
    model = nn.Module()
    model.config = SimpleNamespace(model_type=CONFIG_MAPPING[kind].model_type)
    with pytest.raises(CheckpointError) as refused:
        find_layers(model)
    assert f"{kind!r} is not covered: {NOT_COVERED[kind]}." in str(refused.value)


def test_the_table_in_docs_is_what_is_tested() -> None:
    """SMELT_WRITE_TABLES=1 writes it."""
    table = every_family.table(CLASSES)
    if os.environ.get("SMELT_WRITE_TABLES"):
        TABLE.write_text(table, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table
