"""Every named family, end to end, against transformers on tiny random checkpoints."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import checkpoints
from end_to_end import batches_of, compress, load, logits_of
from smelt import experts
from smelt.checkpoint import mapped
from smelt.checkpoint.bind import (
    MoeLayer,
    find_layers,
    is_common,
    is_module_dict,
    read_bank,
    write_bank,
)
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Walk
from smelt.compress.calibrate import Collector, RoutingStats, calibrate
from smelt.compress.facts import Facts, read_facts, router_names
from smelt.compress.plan import Plan
from smelt.routing import LayerStats

E = checkpoints.NUM_EXPERTS
HALF = E // 2
EAGER_ONLY = ("switch_transformers",)


@dataclass
class Subject:
    """One family's tiny checkpoint, opened and calibrated once for all tests."""

    family: str
    folder: Path
    changes: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(
            checkpoints.save(self.family, self.folder / "source", **self.changes)
        )

    @cached_property
    def model(self) -> PreTrainedModel:
        """The plain model, every tensor in memory of its own: products depend on alignment."""
        model = load(self.checkpoint.folder)[0]
        for param in model.parameters():
            param.data = param.data.clone()
        return model

    @cached_property
    def inputs(self) -> list[dict[str, Tensor]]:
        config = self.checkpoint.config
        return [checkpoints.random_inputs(config, seed=seed) for seed in (0, 1)]

    @cached_property
    def batches(self) -> list[Batch]:
        return batches_of(self.inputs)

    @cached_property
    def logits(self) -> list[Tensor]:
        return [logits_of(self.model, inputs) for inputs in self.inputs]

    @cached_property
    def facts(self) -> Facts:
        return read_facts(self.checkpoint)

    @cached_property
    def layers(self) -> list[MoeLayer]:
        return self.facts.anatomy.layers

    @cached_property
    def stats(self) -> RoutingStats:
        return calibrate(self.checkpoint, self.batches, text="t", sample_tokens=1000)

    def compress(self, name: str, **settings: Any) -> tuple[Path, Plan]:
        """A compression by these settings, made once for each name."""
        return compress(self.checkpoint, self.stats, self.facts, self.folder / name, settings)


@pytest.fixture(scope="module", params=list(checkpoints.FAMILIES))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    mapped.register()
    return Subject(request.param, tmp_path_factory.mktemp(request.param))


def test_every_tensor_read_is_the_one_that_transformers_loads(subject: Subject) -> None:
    subject.checkpoint.check()
    loaded = subject.model.state_dict()
    assert set(subject.checkpoint.state) == set(loaded)
    for name, tensor in loaded.items():
        read = subject.checkpoint.read(name)
        assert read.dtype == tensor.dtype, name
        assert torch.equal(read, tensor), name
    assert not subject.checkpoint.extra_keys


def test_what_is_said_of_the_layers_is_what_the_modules_do(subject: Subject) -> None:
    calls = watch_calls(subject.model, subject.inputs)
    assert [layer.experts for layer in subject.layers] == list(calls)
    groups = {"deepseek_v2": (4, 2, 1), "deepseek_v3": (2, 1, 2), "glm4_moe": (2, 1, 2)}
    is_sigmoid = subject.family in ("deepseek_v3", "glm4_moe")
    for layer in subject.layers:
        assert (layer.num_experts, layer.num_stored) == (E, E)
        assert layer.top_k == calls[layer.experts].choice.shape[1]
        found = (layer.n_group, layer.topk_group, layer.min_per_group)
        assert found == groups.get(subject.family, (1, 1, 1))
        assert layer.is_softmax != is_sigmoid


@dataclass
class Calls:
    """What reached an experts module of the plain model, all batches together."""

    x: Tensor
    choice: Tensor
    weight: Tensor


def watch_calls(model: PreTrainedModel, inputs: list[dict[str, Tensor]]) -> dict[str, Calls]:
    """Inputs, ids and weights of every experts module, in the order of the modules."""
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    hooks = []
    for name, module in model.named_modules():
        if not (is_common(module) or is_module_dict(module)):
            continue

        def before(module: nn.Module, args: Any, name: str = name) -> None:
            x, choice, weight = args
            if is_module_dict(module):
                choice = choice.argmax(-1)
            seen.setdefault(name, []).append((x.flatten(0, -2), choice, weight))

        hooks.append(module.register_forward_pre_hook(before))
    for each in inputs:
        logits_of(model, each)
    for hook in hooks:
        hook.remove()
    order = [name for name, _ in model.named_modules() if name in seen]
    return {n: Calls(*(torch.cat(p) for p in zip(*seen[n], strict=True))) for n in order}


def test_the_walk_computes_what_the_plain_model_computes(subject: Subject) -> None:
    walk = Walk(subject.checkpoint, subject.inputs)
    outputs = {index: output.logits for index, output in walk.run()}
    for index, expected in enumerate(subject.logits):
        assert torch.equal(outputs[index], expected)


def test_observers_change_no_output(subject: Subject) -> None:
    collector = Collector(subject.layers, subject.batches, 10, 0, input_gram=False)
    walk = Walk(subject.checkpoint, subject.inputs)
    for index, output in walk.run(collector.watching):
        torch.testing.assert_close(output.logits, subject.logits[index], atol=1e-5, rtol=1e-5)
    assert list(collector.stats) == [layer.name for layer in subject.layers]


def test_statistics_are_those_of_the_plain_model(subject: Subject) -> None:
    calls = watch_calls(subject.model, subject.inputs)
    for layer in subject.layers:
        stats, call = subject.stats.layers[layer.name], calls[layer.experts]
        assert torch.equal(stats.count, torch.bincount(call.choice.flatten(), minlength=E))
        sums = torch.zeros(E).index_add_(0, call.choice.flatten(), call.weight.flatten().float())
        torch.testing.assert_close(stats.gate_sum.float(), sums, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(stats.input_sample, call.x, atol=1e-5, rtol=1e-5)


def test_logits_are_the_router_applied_to_the_input(subject: Subject) -> None:
    for layer in subject.layers:
        stats: LayerStats = subject.stats.layers[layer.name]
        axes = subject.facts.anatomy.axes[layer.name]
        values = {name: subject.checkpoint.read(name) for name in axes}
        weight, bias = router_names(layer, values)
        expected = stats.input_sample.float() @ values[weight].float().T
        if bias is not None:
            expected += values[bias]
        torch.testing.assert_close(stats.sample_logits, expected, atol=1e-4, rtol=1e-4)


def test_a_bank_written_back_is_what_was_read(subject: Subject) -> None:
    for layer in subject.layers:
        module = subject.checkpoint.model.get_submodule(layer.experts)
        bank = read_bank(module, layer.experts, subject.checkpoint.read)
        written = write_bank(module, layer.experts, bank)
        assert set(written) == set(subject.facts.anatomy.experts[layer.name])
        for name, tensor in written.items():
            assert torch.equal(tensor, subject.checkpoint.read(name)), name


def test_a_bank_computes_what_the_module_computes(subject: Subject) -> None:
    layer = subject.layers[-1]
    module = subject.model.get_submodule(layer.experts)
    bank = read_bank(module, layer.experts, subject.checkpoint.read)
    x = torch.randn(6, bank.model_size)
    for expert in range(E):
        with torch.no_grad():
            expected = run_one(module, expert, x)
        found = experts.apply(bank, expert, x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def run_one(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """The module's own output when every token chooses this expert with weight 1."""
    ids = torch.full((x.shape[0], 1), expert)
    weight = torch.ones(x.shape[0], 1)
    if is_common(module):
        return module(x, ids, weight)
    return module(x, nn.functional.one_hot(ids, E), weight).view_as(x)


def test_keeping_all_experts_writes_the_checkpoint_that_was_read(subject: Subject) -> None:
    folder, _ = subject.compress("all", form="stock", experts=E)
    written = Checkpoint.open(folder)
    assert set(written.tensors) == set(subject.checkpoint.tensors)
    for key, stored in subject.checkpoint.tensors.items():
        found = written.tensors[key]
        assert (found.dtype, found.shape) == (stored.dtype, stored.shape), key
        assert torch.equal(found.read(), stored.read()), key
    assert written.config_dict == subject.checkpoint.config_dict


@pytest.mark.parametrize("method", ["m-smoe", "reap"])
def test_a_stock_checkpoint_is_one_of_its_family(subject: Subject, method: str) -> None:
    folder, plan = subject.compress(f"stock-{method}", form="stock", method=method, experts=HALF)
    model, info = load(folder)
    assert not any(info.values()), info
    assert type(model) is type(subject.model)
    for layer in find_layers(model):
        assert (layer.num_experts, layer.num_stored) == (HALF, HALF)
    assert logits_of(model, subject.inputs[0]).isfinite().all()
    written = Checkpoint.open(folder)
    written.check()
    assert plan.predicted.bytes_after == sum(t.num_bytes for t in written.tensors.values())
    sizes = [math.prod(t.shape) for t in written.tensors.values()]
    assert plan.predicted.params_after == sum(sizes)
    assert {t.dtype for t in written.tensors.values()} == {
        t.dtype for t in subject.checkpoint.tensors.values()
    }


def test_reordering_hidden_units_of_the_source_changes_nothing(
    subject: Subject, tmp_path: Path
) -> None:
    folder, _ = subject.compress("stock-m-smoe", form="stock", method="m-smoe", experts=HALF)
    expected = logits_of(load(folder)[0], subject.inputs[0])
    model = load(subject.checkpoint.folder)[0]
    for layer in subject.layers:
        module = model.get_submodule(layer.experts)
        bank = read_bank(module, layer.experts, model.state_dict().__getitem__)
        order = torch.stack([torch.randperm(bank.hidden_size) for _ in range(E)])
        new = write_bank(module, layer.experts, experts.permute_hidden(bank, order))
        model.load_state_dict(new, strict=False)
    model.save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    stats = calibrate(checkpoint, subject.batches, text="t", sample_tokens=100)
    settings = {"form": "stock", "method": "m-smoe", "experts": HALF}
    found, _ = compress(checkpoint, stats, read_facts(checkpoint), tmp_path / "out", settings)
    actual = logits_of(load(found)[0], subject.inputs[0])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_mapped_computes_what_expanded_computes(subject: Subject) -> None:
    settings = {"method": "m-smoe", "budget": "global", "experts": HALF}
    small, plan = subject.compress("mapped", form="mapped", **settings)
    large, _ = subject.compress("expanded", form="expanded", **settings)
    written = Checkpoint.open(small)
    written.check()
    assert plan.predicted.bytes_after == sum(t.num_bytes for t in written.tensors.values())
    full, info = load(large)
    assert not any(info.values()), info
    expected = logits_of(full, subject.inputs[0])
    for implementation in ("eager", "grouped_mm"):
        if subject.family in EAGER_ONLY and implementation != "eager":
            continue
        model, info = load(small, experts_implementation=implementation)
        assert not any(info.values()), info
        assert [layer.num_stored for layer in find_layers(model)] == [
            layer.num_groups for layer in plan.layers
        ]
        found = logits_of(model, subject.inputs[0])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
