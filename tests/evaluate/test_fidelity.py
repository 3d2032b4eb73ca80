"""Laws of fidelity: a checkpoint is itself, and every measure agrees with the slow way."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import save
from material import FORMS
from smelt.checkpoint.bind import find_layers
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError, PlanError
from smelt.evaluate import layers
from smelt.evaluate.fidelity import compare_logits, fidelity
from smelt.evaluate.results import Setting


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_a_checkpoint_is_faithful_to_itself(material, family):
    have = material(family)
    found = fidelity(have.source, have.source, have.batches)
    assert found.kl.mean == 0
    assert found.agreement.mean == 1
    assert found.layers
    for layer in found.layers:
        assert layer.error == 0
        assert layer.routing_agreement == 1
        assert layer.num_tokens == have.blocks.num_tokens


@pytest.fixture(params=["qwen2_moe", "deepseek_v3"])
def have(request, material):
    return material(request.param)


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_compared_as_by_hand(have, name, tmp_path):
    compressed = have.compress(tmp_path / "out", **FORMS[name])
    found = fidelity(have.source, compressed, have.batches)
    models = [AutoModelForCausalLM.from_pretrained(c.folder) for c in (have.source, compressed)]
    with torch.no_grad():
        logits = [
            m(have.blocks.input_ids, attention_mask=have.blocks.mask.long()).logits for m in models
        ]
    p, q = (one.double().log_softmax(-1) for one in logits)
    where = have.blocks.mask.roll(-1, 1)
    where[:, -1] = False
    kl = (p.exp() * (p - q)).sum(-1)[where]
    assert found.kl.num_tokens == len(kl)
    assert found.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl.standard_error > 0
    same = (p.argmax(-1) == q.argmax(-1))[where]
    assert found.agreement.mean == pytest.approx(float(same.double().mean()))


def slow_layers(have, compressed):
    """Errors and agreement from two whole models, on inputs caught in the original."""
    models = [AutoModelForCausalLM.from_pretrained(c.folder) for c in (have.source, compressed)]
    layers = find_layers(models[0])
    real = have.blocks.mask.flatten()
    inputs, outputs = {}, {}

    def catch(name):
        def hook(module, args, kwargs, output):
            inputs[name] = (args, kwargs)
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [
        models[0]
        .get_submodule(layer.name)
        .register_forward_hook(catch(layer.name), with_kwargs=True)
        for layer in layers
    ]
    with torch.no_grad():
        models[0](have.blocks.input_ids, attention_mask=have.blocks.mask.long())
        for hook in hooks:
            hook.remove()
        errors = {}
        for layer in layers:
            args, kwargs = inputs[layer.name]
            after = models[1].get_submodule(layer.name)(*args, **kwargs)
            after = after[0] if isinstance(after, tuple) else after
            a, b = (t.flatten(0, 1)[real].double() for t in (outputs[layer.name], after))
            errors[layer.name] = float((b - a).square().sum() / a.square().sum())
    return errors


@pytest.mark.parametrize("name", FORMS)
def test_layers_are_compared_on_the_inputs_of_the_original(have, name, tmp_path):
    compressed = have.compress(tmp_path / "out", **FORMS[name])
    found = fidelity(have.source, compressed, have.batches)
    expected = slow_layers(have, compressed)
    assert {layer.name for layer in found.layers} == set(expected)
    for layer in found.layers:
        assert layer.error > 0
        assert layer.error == pytest.approx(expected[layer.name], rel=1e-4)


@pytest.mark.parametrize("name", ["mapped", "expanded"])
def test_a_router_that_is_kept_chooses_the_same_groups(have, name, tmp_path):
    compressed = have.compress(tmp_path / "out", **FORMS[name])
    for layer in fidelity(have.source, compressed, have.batches).layers:
        assert layer.routing_agreement == 1


def test_a_choice_of_a_dropped_expert_agrees_with_none(material, tmp_path):
    have = material("mixtral")
    compressed = have.compress(tmp_path / "out", **FORMS["reap"])
    plan = have.plan(**FORMS["reap"])
    for layer in fidelity(have.source, compressed, have.batches).layers:
        # Rows of kept experts are untouched, so a kept expert that was among the best two of
        # eight is among the best two of four: only choices of dropped ones disagree.
        count = have.stats.layers[layer.name].count
        kept = count[list(plan.layer(layer.name).dominants)].sum() / count.sum()
        assert 0 < kept < 1
        assert layer.routing_agreement == pytest.approx(float(kept))


def test_what_was_not_routed_agrees_with_nothing():
    sums = layers._Sums()
    labels = torch.tensor([0, -1, 1])
    before = torch.tensor([[0, 2], [1, 0], [3, 2]])  # 3: dropped for capacity, so no choice
    after = torch.tensor([[1, 0], [2, 2], [0, 2]])  # 2: dropped for capacity
    sums.add_choices(before, after, (labels, torch.arange(2)))
    assert sums.num_choices == 5
    assert sums.num_agreeing == 2


def test_an_encoder_decoder_is_faithful_to_itself_on_both_sides(material):
    have = material("switch_transformers")  # its capacity of 8 drops most tokens
    found = fidelity(have.source, have.source, have.batches)
    assert found.kl.mean == 0
    assert found.kl.num_tokens == 60
    assert [layer.error for layer in found.layers] == [0, 0]
    assert [layer.routing_agreement for layer in found.layers] == [1, 1]
    assert [layer.num_tokens for layer in found.layers] == [110, 60]


@pytest.mark.parametrize("form", ["mapped", "expanded"])
def test_an_encoder_decoder_keeps_its_routing(material, form, tmp_path):
    have = material("switch_transformers")
    found = fidelity(have.source, have.compress(tmp_path / "out", **FORMS[form]), have.batches)
    assert found.kl.mean > 0
    assert all(layer.error > 0 for layer in found.layers)
    assert [layer.routing_agreement for layer in found.layers] == [1, 1]


def test_layers_are_sampled_by_whole_batches(material):
    have = material("mixtral")
    some = fidelity(have.source, have.source, have.batches, sample_tokens=30)
    assert {layer.num_tokens for layer in some.layers} < {35, 40}
    assert some.kl.num_tokens == int(have.blocks.mask.sum()) - 6
    again = fidelity(have.source, have.source, have.batches, sample_tokens=30)
    assert again.layers == some.layers


def test_records_name_layer_and_plan(material, tmp_path):
    have = material("mixtral")
    compressed = have.compress(tmp_path / "out", **FORMS["stock"])
    found = fidelity(have.source, compressed, have.batches)
    records = found.records(compressed, Setting(("x",), have.blocks.sha256, 0))
    assert len(records) == 2 + 2 * len(found.layers)
    assert all(record.plan_sha256 for record in records)


def test_a_token_that_is_ruled_out_adds_nothing():
    ours = torch.tensor([[[0.0, 1.0, -torch.inf]]])
    kl, agreement = compare_logits(ours, ours, torch.ones(1, 1, dtype=torch.bool))
    assert kl.mean == 0
    assert agreement.mean == 1


# --- what does not compare -----------------------------------------------------------------------


def test_what_does_not_compare_is_refused(material, tmp_path):
    have = material("mixtral")
    for family, changes, words in (
        ("qwen3_moe", {}, "it is a qwen3_moe, the original a mixtral"),
        ("mixtral", {"vocab_size": 80}, "80 tokens, the original 96"),
        ("mixtral", {"num_hidden_layers": 3}, "3 MoE layers"),
        ("mixtral", {"hidden_size": 64}, "of width 64"),
    ):
        save(family, tmp_path / words, **changes)
        with pytest.raises(CheckpointError, match=words):
            fidelity(have.source, Checkpoint.open(tmp_path / words), have.batches)


def test_a_plan_of_another_checkpoint_leaves_routing_out(material, tmp_path):
    have = material("mixtral")
    compressed = have.compress(tmp_path / "out", **FORMS["mapped"])
    other = Checkpoint.open(save("mixtral", tmp_path / "other", seed=1))
    with pytest.warns(UserWarning, match="routing agreement is left out"):
        found = fidelity(other, compressed, have.batches)
    assert [layer.routing_agreement for layer in found.layers] == [None, None]


def test_without_a_plan_and_as_many_experts_choices_are_compared_as_they_are(material, tmp_path):
    have = material("mixtral")
    compressed = have.compress(tmp_path / "out", **FORMS["expanded"])
    (compressed.folder / "smelt" / "plan.json").unlink()
    found = fidelity(have.source, compressed, have.batches)
    assert [layer.routing_agreement for layer in found.layers] == [1, 1]
    smaller = have.compress(tmp_path / "small", **FORMS["stock"])
    (smaller.folder / "smelt" / "plan.json").unlink()
    found = fidelity(have.source, smaller, have.batches)
    assert [layer.routing_agreement for layer in found.layers] == [None, None]


def test_a_plan_that_does_not_fit_the_weights_is_refused(material, tmp_path):
    have = material("mixtral")
    compressed = have.compress(tmp_path / "out", **FORMS["stock"])
    have.plan(form="stock", experts=3).save(compressed.folder / "smelt" / "plan.json")
    with pytest.raises(PlanError, match="The plan is of another folder"):
        fidelity(have.source, compressed, have.batches)
