"""Laws of vectors in the place of experts (MoNE): the mapped form holds them."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from checkpoints import random_inputs, save
from compress.laws import Ground
from end_to_end import batches_of
from smelt.checkpoint import mapped
from smelt.checkpoint.bind import find_layers, read_bank
from smelt.checkpoint.source import Checkpoint
from smelt.compress.apply import apply
from smelt.compress.budget import SCORES
from smelt.compress.calibrate import calibrate
from smelt.compress.facts import read_facts
from smelt.compress.layer_error import layer_errors
from smelt.compress.pipeline import run_plan
from smelt.compress.walking import apply_walking
from smelt.errors import PlanError
from smelt.experts import mixture
from smelt.recipe import CompressRecipe

FAMILIES = ("qwen3_moe", "gpt_oss", "switch_transformers")


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """A checkpoint, its statistics and plan, and what `mone` makes of it."""
    mapped.register()
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = Checkpoint.open(save(request.param, folder / "source"))
    given = batches_of([random_inputs(checkpoint.config, seed=seed) for seed in range(4)])
    stats = calibrate(checkpoint, given, text="t", sample_tokens=200)
    recipe = CompressRecipe(
        source=str(checkpoint.folder), output="-", method="mone", form="mapped", experts=5
    )
    plan = run_plan(checkpoint, stats, recipe)
    out = apply(checkpoint, plan, folder / "out", stats=stats)
    return checkpoint, given, stats, plan, out


def load(folder, **settings):
    is_pair = Checkpoint.open(folder).config.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    return auto.from_pretrained(folder, **settings).eval()


def caught(model, layer, inputs):
    """What the experts of a layer are called with in a forward of the model, and give."""
    calls = []

    def hook(_, args, output):
        calls.append((*args, output))

    handle = model.get_submodule(layer.experts).register_forward_hook(hook)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return calls[0]


def test_a_replaced_expert_gives_its_mean_output_whatever_it_reads(made):
    checkpoint, given, stats, plan, out = made
    new, inputs = load(out), given[0].inputs
    for layer in find_layers(load(checkpoint.folder)):
        x, choice, weight, y = caught(new, layer, inputs)
        if choice.shape[-1] == layer.num_experts and choice.dim() == 3:  # Switch: one-hot
            weight = weight.reshape(-1, 1) * (choice.sum(-1) > 0).reshape(-1, 1)
            choice = choice.argmax(-1).reshape(-1, 1)
            y = y.reshape(len(choice), -1)
        x = x.reshape(len(choice), -1)
        decided = plan.layer(layer.name)
        bank = read_bank(
            checkpoint.model.get_submodule(layer.experts), layer.experts, checkpoint.read
        )
        kept = torch.tensor(decided.labels)[choice] >= 0
        expected = mixture(bank, x, choice.masked_fill(~kept, -1), weight)
        vectors = stats.layers[layer.name].mean_output.float()
        for token in range(len(x)):
            for slot in range(choice.shape[1]):
                if not kept[token, slot]:
                    expected[token] += weight[token, slot] * vectors[choice[token, slot]]
        torch.testing.assert_close(y.float(), expected, atol=1e-4, rtol=1e-4)
        assert not kept.all()


def test_bytes_and_parameters_are_what_the_plan_predicted(made):
    _, _, _, plan, out = made
    tensors = {k: t for f in out.glob("*.safetensors") for k, t in load_file(f).items()}
    assert sum(t.nbytes for t in tensors.values()) == plan.predicted.bytes_after
    assert sum(p.numel() for p in load(out).parameters()) == plan.predicted.params_after
    assert all(t.shape[0] == 3 for k, t in tensors.items() if k.endswith(".constants"))


LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
auto = AutoModelForSeq2SeqLM if sys.argv[4] == "pair" else AutoModelForCausalLM
model = auto.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "smelt" not in sys.modules
with torch.no_grad():
    torch.save(model.eval()(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_it_loads_without_smelt_with_the_same_logits(made, tmp_path):
    checkpoint, given, _, _, out = made
    inputs = given[0].inputs
    torch.save(inputs, tmp_path / "in.pt")
    kind = "pair" if checkpoint.config.is_encoder_decoder else "one"
    words = [out, tmp_path / "in.pt", tmp_path / "out.pt", kind]
    subprocess.run([sys.executable, "-c", LOADS, *map(str, words)], check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "out.pt"), load(out)(**inputs).logits)


def test_the_error_on_the_sample_is_that_of_the_layer(made):
    """Experts replaced by their means err less than experts that give nothing."""
    checkpoint, _, stats, plan, _ = made
    facts = read_facts(checkpoint)
    dropping = run_plan(
        checkpoint,
        stats,
        plan.recipe.model_copy(update={"method": "frequency", "score": "usage-variance"}),
    )
    ours, nothing = (layer_errors(checkpoint, facts, p, stats) for p in (plan, dropping))
    assert all(ours[name] < nothing[name] for name in ours)


def test_constants_train_in_a_reconstruction(tmp_path):
    ground = Ground.make(tmp_path / "source")
    settings = {"method": "mone", "form": "mapped", "experts": 4}
    ids = torch.randint(3, 90, (16, 80), generator=torch.Generator().manual_seed(2))
    plan = ground.plan(tmp_path / "out", **settings, reconstruct={"steps": 40, "batch_tokens": 128})
    out = apply_walking(
        ground.checkpoint,
        plan,
        tmp_path / "out",
        batches=batches_of([{"input_ids": part} for part in ids.split(4)]),
        stats=ground.stats,
        facts=ground.facts,
    )
    plain = ground.compress(tmp_path / "plain", **settings)
    first, second = (
        {k: t for f in o.glob("*.safetensors") for k, t in load_file(f).items()}
        for o in (out, plain)
    )
    changed = {k.rpartition(".")[2] for k in first if not torch.equal(first[k], second[k])}
    assert {"constants", "down_proj", "weight"} <= changed


def test_the_score_is_low_for_experts_that_are_rare_or_always_say_the_same(made):
    _, _, stats, _, _ = made
    layer = next(iter(stats.layers.values()))
    expected = layer.count / layer.count.sum() * layer.output_var
    torch.testing.assert_close(SCORES["usage-variance"](layer), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "stock"}, "Set form: mapped"),
        ({"form": "expanded"}, "Set form: mapped"),
        ({"form": "mapped", "decompose": {"rank": 2}}, "Leave decompose out"),
    ],
)
def test_where_constants_cannot_be_they_are_refused(tmp_path, settings, message):
    ground = Ground.make(tmp_path / "source")
    with pytest.raises(PlanError, match=message):
        ground.plan(tmp_path / "out", method="mone", **settings)


def test_a_checkpoint_with_constants_is_not_compressed_again(made):
    _, given, _, plan, out = made
    again = Checkpoint.open(out)
    stats = calibrate(again, given, text="t", sample_tokens=50)
    with pytest.raises(PlanError, match="it was made from"):
        run_plan(again, stats, plan.recipe)
