"""The baselines of the M-SMoE paper as checkpoints: same groups, same budget, every form."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from checkpoints import random_inputs, save
from compress.laws import TOKENS, batches
from material import Material
from smelt.checkpoint.inputs import make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.compress.apply import apply
from smelt.compress.calibrate import calibrate
from smelt.compress.gradients import with_gradients
from smelt.compress.layer_error import layer_errors
from smelt.compress.methods import METHODS_TABLE
from smelt.compress.plan import Plan
from smelt.compress.walking import apply_walking
from smelt.errors import PlanError
from smelt.evaluate.fidelity import fidelity

MERGING = ("redirect", "average", "zipit", "repair", "git-rebasin", "fisher", "regmean")
FAMILIES = ("qwen3_moe", "gpt_oss", "switch_transformers")


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Material:
    folder = save("qwen3_moe", tmp_path_factory.mktemp("source"), num_hidden_layers=3)
    material = Material(folder)
    batches = make_batches(material.source, material.blocks, 2)
    material.stats = with_gradients(material.stats, material.source, batches)
    return material


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Material:
    return Material(save(request.param, tmp_path_factory.mktemp(request.param)))


def logits(source: Checkpoint, **attention: Any) -> torch.Tensor:
    is_pair = source.config.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    model = auto.from_pretrained(source.folder, **attention).eval()
    with torch.no_grad():
        return model(**random_inputs(model.config)).logits


def decisions(plan: Plan) -> list[tuple[Any, ...]]:
    return [(la.name, la.dominants, la.labels, la.bytes_after) for la in plan.layers]


# --- equal footing -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stock", "mapped", "expanded"])
@pytest.mark.parametrize("method", MERGING)
def test_groups_and_budget_are_those_of_m_smoe(ground, method, form):
    for settings in ({"experts": 4}, {"experts": 3, "score": "saliency", "similarity": "random"}):
        ours = ground.plan(method="m-smoe", form=form, **settings)
        theirs = ground.plan(method=method, form=form, **settings)
        assert decisions(theirs) == decisions(ours)
        assert theirs.predicted == ours.predicted
    assert METHODS_TABLE[method].operator == "merge"


@pytest.mark.parametrize("form", ["stock", "mapped", "expanded"])
def test_pruning_keeps_the_dominant_experts_of_m_smoe(ground, form):
    ours = ground.plan(method="m-smoe", form=form, experts=4)
    theirs = ground.plan(method="prune", form=form, experts=4)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert a.dominants == b.dominants
        assert b.labels == tuple(a.labels[e] if e in a.dominants else -1 for e in range(8))
        assert a.bytes_after == b.bytes_after
    assert theirs.predicted.params_after == ours.predicted.params_after
    if form == "mapped":
        assert len({layer.num_groups for layer in theirs.layers}) > 1  # a global budget
        before, after = theirs.predicted, ours.predicted
        assert before.moe_flops_per_token_after < after.moe_flops_per_token_after


# --- carried out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prune", *MERGING])
def test_the_mapped_form_is_the_expanded_form(ground, tmp_path, method):
    settings = {"method": method, "experts": 4}
    found = {}
    for form in ("mapped", "expanded"):
        done = ground.compress(tmp_path / form, form=form, **settings)
        plan = Plan.load(done.folder / "smelt" / "plan.json")
        on_disk = [t for f in done.folder.glob("*.safetensors") for t in load_file(f).values()]
        assert sum(t.nbytes for t in on_disk) == plan.predicted.bytes_after
        found[form] = logits(done)
    torch.testing.assert_close(found["mapped"], found["expanded"], rtol=1e-4, atol=1e-4)


def test_every_method_makes_another_checkpoint(ground, tmp_path):
    found = {m: logits(ground.compress(tmp_path / m, form="mapped", method=m, experts=4))
             for m in ("m-smoe", "prune", *MERGING)}  # fmt: skip
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.allclose(found[a], found[b], atol=1e-5), (a, b)


@pytest.mark.parametrize("method", ["zipit", "regmean", "repair", "fisher"])
def test_applying_a_plan_twice_gives_the_same_bytes(ground, tmp_path, method):
    plan = ground.plan(method=method, form="mapped", experts=4)
    folders = [
        apply(ground.source, plan, tmp_path / str(n), stats=ground.stats, workers=n) for n in (1, 3)
    ]
    shards = [{f.name: f.read_bytes() for f in d.glob("*.safetensors")} for d in folders]
    assert shards[0] == shards[1]


@pytest.mark.parametrize(
    ("method", "needs"), [("zipit", "rule zipit"), ("regmean", "rule regmean"), ("repair", "activ")]
)
def test_a_rule_that_reads_tokens_says_that_it_needs_the_statistics(
    ground, tmp_path, method, needs
):
    plan = ground.plan(method=method, form="mapped", experts=4)
    with pytest.raises(PlanError, match=f"{needs}.*--stats"):
        apply(ground.source, plan, tmp_path / "out")


def test_fisher_without_its_gradients_is_refused(ground, tmp_path):
    plan = ground.plan(method="fisher", form="mapped", experts=4)
    with pytest.raises(PlanError, match="with gradients"):
        apply(ground.source, plan, tmp_path / "out")


def test_a_plan_measures_the_error_of_every_method(ground):
    for method in ("prune", *MERGING):
        plan = ground.plan(method=method, form="mapped", experts=4)
        errors = layer_errors(ground.source, ground.facts, plan, ground.stats)
        assert all(0 < value < 10 for value in errors.values()), method


# --- dropped experts -----------------------------------------------------------------------------


def without_dropped(material: Material, plan: Plan) -> dict[str, torch.Tensor]:
    """The source's weights, dropped experts zero, each family's own names."""
    state = {name: material.source.read(name).clone() for name in material.source.state}
    for layer in material.facts.anatomy.layers:
        labels = plan.layer(layer.name).labels
        for name in material.facts.anatomy.experts[layer.name]:
            for expert, label in enumerate(labels):
                if label >= 0:
                    continue
                if ".expert_" in name:
                    if f".expert_{expert}." in name:
                        state[name].zero_()
                else:
                    state[name][expert] = 0
    return state


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_tokens_that_chose_a_dropped_expert_get_nothing_from_that_choice(family, tmp_path, experts):
    settings = {"method": "prune", "experts": 3, "form": "mapped", "min_per_layer": 1}
    done = family.compress(tmp_path / "pruned", **settings)
    plan = family.plan(**settings)
    assert min(min(layer.labels) for layer in plan.layers) == -1
    is_pair = family.source.config.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    how = {} if is_pair else {"experts_implementation": experts}
    model = auto.from_pretrained(family.source.folder, **how).eval()
    model.load_state_dict(without_dropped(family, plan))
    with torch.no_grad():
        expected = model(**random_inputs(model.config)).logits
    torch.testing.assert_close(logits(done, **how), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(family.compress(tmp_path / "expanded", **settings | {"form": "expanded"}), **how),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_pruned_checkpoint_trains_and_its_gradients_are_finite(family, tmp_path):
    done = family.compress(tmp_path / "pruned", method="prune", experts=3, form="mapped")
    is_pair = done.config.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    model = auto.from_pretrained(done.folder)
    model(**random_inputs(model.config)).logits.square().mean().backward()
    experts = [p.grad for n, p in model.named_parameters() if ".experts." in n]
    assert any(g is not None and g.abs().max() > 0 for g in experts)
    assert all(bool(torch.isfinite(g).all()) for g in experts if g is not None)


def test_a_pruned_checkpoint_is_compared_with_its_original(ground, tmp_path):
    done = ground.compress(tmp_path / "pruned", method="prune", experts=4, form="mapped")
    batches = make_batches(ground.source, ground.blocks, 2)
    found = fidelity(ground.source, done, batches)
    plan = ground.plan(method="prune", experts=4, form="mapped")
    shares = layer_errors(ground.source, ground.facts, plan, ground.stats)
    first = found.layers[0]
    assert first.error == pytest.approx(shares[first.name], rel=0.2)


def test_the_statistics_of_a_pruned_checkpoint_count_no_output_of_dropped_experts(ground, tmp_path):
    done = ground.compress(tmp_path / "pruned", method="prune", experts=4, form="mapped")
    stats = calibrate(done, make_batches(done, ground.blocks, 2), text="t", sample_tokens=50)
    plan = ground.plan(method="prune", experts=4, form="mapped")
    for layer in plan.layers:
        found = stats.layers[layer.name]
        dropped = torch.tensor(layer.labels) < 0
        assert bool((found.output_norm[dropped] == 0).all())
        assert bool((found.output_norm[~dropped & (found.count > 0)] > 0).all())


def test_a_sequential_compression_by_any_rule_loads_and_has_the_predicted_bytes(ground, tmp_path):
    for method in ("prune", "zipit", "fisher", "git-rebasin"):
        plan = ground.plan(method=method, form="mapped", experts=4, sequential=True)
        folder = apply_walking(
            ground.source,
            plan,
            tmp_path / method,
            batches=batches(2),
            stats=ground.stats,
            facts=ground.facts,
        )
        on_disk = [t for f in folder.glob("*.safetensors") for t in load_file(f).values()]
        assert sum(t.nbytes for t in on_disk) == plan.predicted.bytes_after
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            assert bool(torch.isfinite(model(TOKENS).logits).all())
