"""Laws of the factored form: its function, gradients, bytes, and its open state."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import checkpoints
import every_family
from reference import factored as slow
from smelt.checkpoint import factored, mapped
from smelt.checkpoint import sink as sinks
from smelt.checkpoint.bind import activation_of, find_layers, read_bank, write_bank
from smelt.checkpoint.describe import describe
from smelt.checkpoint.factor_bank import factor_spec, read_factors, write_factors
from smelt.checkpoint.factored_forward import _grouped, _routed, expert_output, matrices
from smelt.checkpoint.sink import Sink
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.walk import Walk
from smelt.compress.decompose import decompose, truncated_svd
from smelt.experts import ExpertBank
from smelt.factors import FactorBank

FAMILIES = ("qwen3_moe", "gpt_oss", "switch_transformers")  # gated; biased, interleaved; one-hot
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0], dtype=torch.int32)
RANK, SHARE = 3, 0.3

mapped.register()


def written(folder: Path, family: str, **changes) -> tuple[Path, Path, dict[str, FactorBank]]:
    """A factored checkpoint, the mapped one it multiplies out to, and its banks by module."""
    source = Checkpoint.open(checkpoints.save(family, folder / "source", **changes))
    layers = find_layers(source.model)
    banks, new, plain = {}, {}, {}
    for layer in layers:
        module = source.model.get_submodule(layer.experts)
        whole = read_bank(module, layer.experts, source.read)
        bank = whole.map(lambda t: t[:4].contiguous())
        ranks = dict.fromkeys(["up", "down"] if bank.gate is None else ["gate", "up", "down"], RANK)
        banks[layer.experts] = decompose(bank, ranks, SHARE)
        own_map = {f"{layer.experts}.expert_map": LABELS}
        new |= write_factors(layer.experts, banks[layer.experts]) | own_map
        plain |= write_bank(module, layer.experts, banks[layer.experts].dense()) | own_map
    stored = dict.fromkeys(banks, 4)
    specs = {name: factor_spec(bank) for name, bank in banks.items()}
    configs = {
        "factored": sinks.factored_config(source, stored, specs, without_mtp=False),
        "dense": sinks.mapped_config(source, stored, without_mtp=False),
    }
    rest = [n for n in source.layout if not n.startswith(tuple(f"{name}." for name in banks))]
    same = {name: source.read(name) for name in rest}
    for name, tensors in (("factored", new), ("dense", plain)):
        sink = Sink(folder / name, source, key="k")
        sink.write(0, 1, same | tensors)
        sink.finish(1, configs[name], {})
    return folder / "factored", folder / "dense", banks


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    return written(tmp_path_factory.mktemp(request.param), request.param)


def auto(folder: Path):
    kind = json.loads((folder / "config.json").read_text())["auto_map"]
    name = next(n for n in kind if n != "AutoConfig")
    return getattr(transformers, name)


def load(folder: Path, **settings):
    return auto(folder).from_pretrained(folder, **settings).eval()


def logits(model):
    with torch.no_grad():
        return model(**checkpoints.random_inputs(model.config), use_cache=False).logits


def same(model, other) -> None:
    """Equal logits, but for the last digit: products depend on where in memory a tensor begins."""
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-5)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


def experts_of(model) -> dict[str, nn.Module]:
    return {layer.experts: model.get_submodule(layer.experts) for layer in find_layers(model)}


def state(module) -> dict[str, torch.Tensor]:
    return {**module._parameters, **module._buffers}


def routing(module, num_tokens=11, top_k=3, seed=0):
    """Tokens, choices and weights as the family passes them, and choices as ids."""
    generator = torch.Generator().manual_seed(seed)
    is_one_hot = isinstance(module, nn.ModuleDict)
    top_k = 1 if is_one_hot else top_k
    width = module.up_v.shape[2]
    x = torch.randn(num_tokens, width, generator=generator)
    scores = torch.rand(num_tokens, len(module.expert_map), generator=generator)
    ids = scores.topk(top_k, dim=1).indices
    weight = torch.rand(num_tokens, top_k, generator=generator)
    choice = nn.functional.one_hot(ids, len(module.expert_map)) if is_one_hot else ids
    return x, choice, weight, ids


# --- the function --------------------------------------------------------------------------------


def test_the_factored_form_is_the_dense_reconstruction(both):
    few, dense, _ = both
    found, expected = logits(load(few)), logits(load(dense))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [0, 1, 11, 400])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_forward_is_the_layer_token_by_token(both, num_tokens, with_gradients, monkeypatch):
    monkeypatch.setattr("smelt.checkpoint.factored_forward._FEW_ROWS", 100)
    monkeypatch.setattr("smelt.checkpoint.factored_forward._TOKENS_AT_ONCE", 16)
    module = next(iter(experts_of(load(both[0])).values())).double()
    x, choice, weight, ids = routing(module, num_tokens)
    x, weight = x.double(), weight.double()
    with torch.set_grad_enabled(with_gradients):
        found = module(x, choice, weight)
    if not num_tokens:
        assert found.shape == x.shape
        return
    own = state(module)
    expected = slow.layer(own, activation_of(module), module.expert_map, x, ids, weight)
    torch.testing.assert_close(found, expected)


def test_gradients_are_those_of_the_dense_reconstruction(both):
    module = next(iter(experts_of(load(both[0])).values())).double()
    names = [n for n, p in module._parameters.items() if p is not None]
    x, choice, weight, ids = routing(module)
    results = []
    for is_slow in (False, True):
        leaf = x.double().requires_grad_()
        gate = weight.double().requires_grad_()
        own = {n: t.detach().clone() for n, t in state(module).items()}
        params = [own[n].requires_grad_() for n in names]
        if is_slow:
            y = slow.layer(own, activation_of(module), module.expert_map, leaf, ids, gate)
        else:
            y = torch.func.functional_call(module, own, (leaf, choice, gate))
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        results.append(torch.autograd.grad(loss, [leaf, gate, *params]))
    for name, found, expected in zip(["x", "weight", *names], *results, strict=True):
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(found, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_the_grouped_kernel_gives_what_the_loop_gives(both):
    """On a CPU, where torch has the kernel too; widths are multiples of 16 bytes for it."""
    module = next(iter(experts_of(load(both[0])).values()))
    _widen(module)
    x, choice, weight, _ = routing(module)
    stored, _ = _routed(module, choice, weight)
    order = stored.flatten().argsort(stable=True)
    counts = torch.bincount(stored.flatten(), minlength=5)
    order = order[: int(counts[:4].sum())]
    rows = x[order // stored.shape[1]].requires_grad_()
    sizes = counts[:4].tolist()
    found = _grouped(module, rows, sizes)
    blocks = rows.split(sizes)
    expected = torch.cat([expert_output(module, e, b) for e, b in enumerate(blocks)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    inputs = [rows, *(p for p in module.parameters() if p.requires_grad)]
    both_grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
    for a, b in zip(*both_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def _widen(module: nn.Module) -> None:
    """Rank 4 where it was 3: a column of zeros in U."""
    for m in matrices(module):
        u, v = module.get_parameter(f"{m}_u"), module.get_parameter(f"{m}_v")
        module.register_parameter(f"{m}_u", nn.Parameter(nn.functional.pad(u.data, (0, 1))))
        module.register_parameter(
            f"{m}_v", nn.Parameter(nn.functional.pad(v.data, (0, 0, 0, 1), value=1.0))
        )


def test_two_choices_of_one_group_run_once(tmp_path):
    few, _, _ = written(tmp_path, "qwen3_moe")
    module = next(iter(experts_of(load(few)).values()))
    seen = []
    module.act_fn.register_forward_hook(lambda m, args, y: seen.append(len(y)))
    x = torch.randn(2, 32)
    choice = torch.tensor([[0, 4], [0, 1]])  # experts 0 and 4 are both in group 0
    weight = torch.tensor([[0.5, 0.25], [0.5, 0.25]])
    for with_gradients in (True, False):
        seen.clear()
        with torch.set_grad_enabled(with_gradients):
            found = module(x, choice, weight)
        assert sum(seen) == 3
        expected = slow.layer(
            state(module), activation_of(module), module.expert_map, x, choice, weight
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        seen.clear()


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_slot_without_an_expert_adds_nothing(both, num_tokens, with_gradients):
    """A token dropped for capacity (Switch), or an expert that the map sends nowhere."""
    module = next(iter(experts_of(load(both[0])).values()))
    x, choice, weight, ids = routing(module, num_tokens)
    if isinstance(module, nn.ModuleDict):
        choice[0] = 0
    else:
        module.expert_map[ids[0]] = module.num_experts
    with torch.set_grad_enabled(with_gradients):
        found = module(x, choice, weight)
    assert not found[0].any()
    if num_tokens > 1:
        assert found[1:].any()


def test_numbers_of_rows_that_change_are_seen(both):
    module = next(iter(experts_of(load(both[0])).values()))
    x, choice, weight, ids = routing(module)

    def right():
        with torch.no_grad():
            found = module(x, choice, weight)
        expected = slow.layer(
            state(module), activation_of(module), module.expert_map, x, ids, weight
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    right()
    module.up_row_ids.copy_(torch.arange(len(module.up_row_ids)))  # in place
    right()
    module.up_row_ids = torch.arange(len(module.up_row_ids), dtype=torch.int32) * 2  # another
    right()


def test_switch_drops_hidden_units_in_training_only(tmp_path):
    few, *_ = written(tmp_path, "switch_transformers", dropout_rate=0.5)
    model = load(few)
    module = next(iter(experts_of(model).values()))
    x, choice, weight, _ = routing(module, 200)
    quiet = module(x, choice, weight)
    module.train()
    torch.manual_seed(0)
    noisy = torch.stack([module(x, choice, weight) for _ in range(400)])
    assert not torch.allclose(noisy[0], quiet)
    error = (noisy.mean(0) - quiet).square().mean()
    assert error < 0.02 * (noisy - quiet).square().mean()  # right on average
    module.dropout.p = 0.0
    torch.testing.assert_close(module(x, choice, weight), quiet)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_factors_work_in_and_out_of_training(tmp_path, family):
    few, dense, banks = written(tmp_path, family, dtype=torch.bfloat16)
    model, plain = load(few, dtype=torch.bfloat16), load(dense, dtype=torch.bfloat16)
    for module in experts_of(model).values():
        assert module.up_u.dtype == module.up_rows.dtype == torch.bfloat16
    assert {t.dtype for t in next(iter(banks.values())).tensors().values()} == {
        torch.bfloat16, torch.int32,
    }  # fmt: skip
    wide = logits(load(dense, dtype=torch.float32))
    own, other = (logits(m).float() - wide for m in (model, plain))
    assert own.norm() < 2 * other.norm() + 1e-3 * wide.norm()
    model.train()
    inputs = checkpoints.random_inputs(model.config)
    model(**inputs).logits.float().square().mean().backward()
    for module in experts_of(model).values():
        assert module.up_rows.grad.isfinite().all() and module.up_rows.grad.any()


def test_autocast_computes_in_its_own_type(both):
    model = load(both[0])
    wide = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model).float()
    assert 0 < float((found - wide).norm() / wide.norm()) < 0.05


def test_gradient_checkpointing_changes_no_gradient(both):
    gradients = []
    for is_checkpointed in (False, True):
        model = load(both[0]).train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)  # dropout and jitter
        inputs = checkpoints.random_inputs(model.config)
        model(**inputs, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(".up_rows" in name for name in gradients[0])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


# --- on disk -------------------------------------------------------------------------------------


def test_bytes_on_disk_are_those_of_the_factors_and_the_map(both):
    few, _, banks = both
    for name, bank in banks.items():
        own = {k: t for k, t in tensors(few).items() if k.startswith(f"{name}.")}
        assert sum(t.nbytes for t in own.values()) == bank.num_bytes + 4 * len(LABELS)
        rows = [t for k, t in own.items() if k.endswith("_rows")]
        assert rows and all((t != 0).any(1).all() for t in rows)
    loaded = sum(t.nbytes for t in state_of_experts(load(few)))
    assert loaded == sum(b.num_bytes + 4 * len(LABELS) for b in banks.values())


def state_of_experts(model):
    return [t for module in experts_of(model).values() for t in module.state_dict().values()]


def test_saved_and_loaded_again_it_is_the_same(both, tmp_path):
    model = load(both[0])
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(both[0]), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    for name in (mapped.FILE_NAME, *mapped.NEIGHBOURS):
        assert (tmp_path / "again" / name).read_bytes() == (both[0] / name).read_bytes()
    again, info = auto(tmp_path / "again").from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(info.values()), info
    same(again.eval(), model)


LOADS = """
import sys, torch, transformers
{imports}
model = transformers.{auto}.from_pretrained(sys.argv[1], **{options}).eval()
assert ("smelt" in sys.modules) == {has_smelt}
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[3])
out = model.generate(inputs["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
assert out.shape[1] >= 2
model.save_pretrained(sys.argv[4])
"""


@pytest.mark.parametrize(
    ("family", "imports", "options"),
    [
        ("gpt_oss", "", "{'trust_remote_code': True}"),
        ("switch_transformers", "import smelt", "{}"),
    ],
)
def test_it_loads_in_a_fresh_process_with_identical_logits(tmp_path, family, imports, options):
    both = written(tmp_path, family)
    model = load(both[0])
    torch.save(checkpoints.random_inputs(model.config), tmp_path / "inputs.pt")
    code = LOADS.format(
        imports=imports, options=options, has_smelt=bool(imports), auto=auto(both[0]).__name__
    )
    files = [tmp_path / name for name in ("inputs.pt", "logits.pt", "saved")]
    subprocess.run([sys.executable, "-c", code, both[0], *files], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))
    same(load(tmp_path / "saved"), model)


def test_a_cached_decode_is_the_full_forward(both):
    model = load(both[0])
    ids = checkpoints.random_inputs(model.config)["input_ids"][:1, :5]
    settings = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    cached, full = (model.generate(ids, **settings, use_cache=c) for c in (True, False))
    assert torch.equal(cached, full)


# --- opened by smelt -----------------------------------------------------------------------------


def test_its_banks_are_read_as_factors_and_multiplied_out(both):
    checkpoint = Checkpoint.open(both[0])
    checkpoint.check()
    assert not checkpoint.extra_keys
    for name, bank in both[2].items():
        module = checkpoint.model.get_submodule(name)
        found = read_factors(module, name, checkpoint.read, activation_of(module))
        assert factor_spec(found) == factor_spec(bank)
        assert all(torch.equal(t, bank.tensors()[n]) for n, t in found.tensors().items())
        dense = read_bank(module, name, checkpoint.read)
        assert isinstance(dense, ExpertBank)
        assert all(torch.equal(t, bank.dense().tensors()[n]) for n, t in dense.tensors().items())


def test_it_is_described_and_its_parameters_counted(both):
    about = describe(Checkpoint.open(both[0]))
    assert about.num_stored == [4] * len(both[2])
    assert about.num_experts == [8] * len(both[2])
    model = load(both[0])
    assert about.num_params == model.num_parameters()
    assert about.bytes_by_part["experts"] == sum(t.nbytes for t in state_of_experts(model))
    assert about.num_bytes == sum(t.nbytes for t in tensors(both[0]).values())
    (fact,) = [f for f in about.facts if "decomposed" in f]
    assert f"in {len(both[2])} of {len(both[2])} layers: rank {RANK}, and rows" in fact


def test_the_walk_is_the_models_own_forward(both):
    checkpoint = Checkpoint.open(both[0])
    inputs = [checkpoints.random_inputs(checkpoint.config, seed=s) for s in (0, 1)]
    model = load(both[0])
    for index, output in Walk(checkpoint, inputs).run():
        with torch.no_grad():
            torch.testing.assert_close(output.logits, model(**inputs[index]).logits)


# --- open and closed -----------------------------------------------------------------------------


def ranks_of(model, rank=RANK) -> dict[str, dict[str, int]]:
    names = {"gate", "up", "down"}
    found = {}
    for name, module in experts_of(model).items():
        gated = not isinstance(module, nn.ModuleDict) and module.has_gate
        found[name] = dict.fromkeys(names if gated else names - {"gate"}, rank)
    return found


def masks_of(model, share=0.5, seed=0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {
            m: torch.rand(module.get_parameter(f"{m}_s").shape[:2], generator=generator) < share
            for m in matrices(module)
        }
        for name, module in experts_of(model).items()
    }


def test_opening_changes_nothing(both):
    for folder in both[:2]:  # a factored model and a mapped one
        model = load(folder)
        expected = logits(model)
        factored.open_model(model, ranks_of(model), truncated_svd)
        assert all(factored.is_open(m) for m in experts_of(model).values())
        torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-5)


def test_the_gradient_of_s_is_that_of_the_weight(both):
    """W = U V + S, so ∂L/∂S = ∂L/∂W: of the mapped model's own experts."""
    plain = load(both[1])
    model = copy.deepcopy(plain)
    factored.open_model(model, ranks_of(model), truncated_svd)
    for each in (plain, model):
        inputs = checkpoints.random_inputs(each.config)
        each(**inputs).logits.square().mean().backward()
    for name, module in experts_of(model).items():
        dense = plain.get_submodule(name)
        expected = factored.dense_weights(
            dense, lambda p: p.grad if p.grad is not None else torch.zeros_like(p)
        )
        for m in matrices(module):
            found = module.get_parameter(f"{m}_s").grad
            assert expected[m].any()
            torch.testing.assert_close(found, expected[m], atol=1e-6, rtol=1e-3)
            u, v = (module.get_parameter(f"{m}_{part}") for part in "uv")
            torch.testing.assert_close(u.grad, expected[m] @ v.mT, atol=1e-6, rtol=1e-3)
            torch.testing.assert_close(v.grad, u.mT @ expected[m], atol=1e-6, rtol=1e-3)


def test_closing_keeps_what_the_masks_keep_and_saves_it_compactly(both, tmp_path):
    model = load(both[1])
    factored.open_model(model, ranks_of(model), truncated_svd)
    masks = masks_of(model)
    for name, own in masks.items():
        module = model.get_submodule(name)
        for m, mask in own.items():
            module.get_parameter(f"{m}_s").data[~mask] = 0.0  # as pruning leaves them
    expected = logits(model)
    factored.close_model(model, masks)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "closed")
    same(load(tmp_path / "closed"), model)
    specs = json.loads((tmp_path / "closed" / "config.json").read_text())["factored_experts"]
    for name, own in masks.items():
        expected = {m: {"rank": RANK, "rows": int(mask.sum())} for m, mask in own.items()}
        assert specs[name] == expected
        for m, mask in own.items():
            ids = tensors(tmp_path / "closed")[f"{name}.{m}_row_ids"]
            assert ids.tolist() == mask.flatten().nonzero().flatten().tolist()
    assert not any(k.endswith("_s") for k in tensors(tmp_path / "closed"))
    Checkpoint.open(tmp_path / "closed").check()


def test_opened_and_closed_by_its_own_rows_it_is_as_before(both, tmp_path):
    model = load(both[0])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    masks = {}
    for name, module in experts_of(model).items():
        masks[name] = {}
        for m in matrices(module):
            mask = torch.zeros(module.get_parameter(f"{m}_u").shape[:2], dtype=torch.bool)
            mask.view(-1)[module.get_buffer(f"{m}_row_ids").long()] = True
            masks[name][m] = mask
    factored.open_model(model, ranks_of(model), truncated_svd)
    factored.close_model(model, masks)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_an_open_model_trains_and_its_factors_too(both):
    model = load(both[1])
    factored.open_model(model, ranks_of(model), truncated_svd)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = checkpoints.random_inputs(model.config)
    losses = []
    for _ in range(4):
        loss = model(**inputs).logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


def test_what_cannot_be_opened_or_closed_is_refused(both):
    model = load(both[1])
    ranks = ranks_of(model)
    name, module = next(iter(experts_of(model).items()))
    with pytest.raises(ValueError, match="is not open"):
        factored.close_experts(module, {})
    with pytest.raises(ValueError, match="cannot be opened"):
        factored.open_experts(nn.Linear(2, 2), {}, truncated_svd)
    factored.open_model(model, ranks, truncated_svd)
    with pytest.raises(ValueError, match="cannot be opened"):
        factored.open_experts(module, ranks[name], truncated_svd)
    masks = masks_of(model)
    wrong = masks[name] | {"up": masks[name]["up"][:, 1:]}
    with pytest.raises(ValueError, match="up: a mask of"):
        factored.close_experts(module, wrong)
    with pytest.raises(ValueError, match="no mask is given"):
        factored.close_model(model, {n: m for n, m in masks.items() if n != name})
    other = load(both[0])
    with pytest.raises(ValueError, match=f"rank 2 asked for, the module has {RANK}"):
        factored.open_model(other, ranks_of(other, rank=2), truncated_svd)


# --- every family --------------------------------------------------------------------------------

CLASSES = {each.name: each for each in every_family.experts_classes()}
MAPPED = [n for n in CLASSES if n not in every_family.NOT_WORKING | every_family.STOCK_ONLY]


@pytest.mark.parametrize("name", MAPPED)
def test_every_family_that_can_be_mapped_can_be_factored(name):
    from checkpoint.test_every_family import tiny_model

    model = tiny_model(CLASSES[name])
    for module in experts_of(model).values():
        count = module.num_experts
        mapped.map_experts(module, count // 2)
        module.expert_map.copy_(torch.arange(count) % (count // 2))
    expected = logits(model)
    factored.open_model(model, ranks_of(model, rank=2), truncated_svd)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    every = masks_of(model, share=2.0)
    model.config.factored_experts = None
    factored.close_model(model, every)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
