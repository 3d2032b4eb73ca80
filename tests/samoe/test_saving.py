"""What is written is what was there: round trips, Auto classes, ties, adapters."""

import copy
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import smelt
from samoe.tiny import PRESETS, build, logits, tiny, tokens
from smelt.errors import RecipeError
from smelt.samoe.backbone import SaMoEModel
from smelt.samoe.model import (
    SaMoEForCausalLM,
    SaMoEForMaskedLM,
    SaMoEForSequenceClassification,
)

IDS = tokens(2, 8)


def identical(loaded, model):
    """Equal parameters and logits, bit for bit.

    Of a copy: the loaded tensors are views into the file, where a matrix may lie across cache lines
    and its kernel add in another order.
    """
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=2e-5)
    return torch.equal(logits(copy.deepcopy(loaded), IDS), logits(model, IDS))


def stored(folder):
    """The tensors of a checkpoint by name, as they lie on disk."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sharing": "none"},
        {"sharing": "bottom", "tie_word_embeddings": False},
        {"mix": "weight", "alpha_scope": "expert", "shared_router": True, "pool_size": 3},
        {"sharing": "residual", "use_beta": False},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())) or "pool",
)
def test_a_saved_model_loads_with_identical_logits(fields, preset, tmp_path):
    model = build(tiny(preset, moe_every=1, **fields))
    model.save_pretrained(tmp_path)
    loaded = SaMoEForCausalLM.from_pretrained(tmp_path)
    assert identical(loaded, model)
    assert loaded.config.to_dict() | {"dtype": None} == AutoConfig.from_pretrained(
        tmp_path
    ).to_dict() | {"dtype": None}
    # Every shared pool, and a tied embedding, lies on disk once.
    tensors = stored(tmp_path)
    assert sum(t.numel() for t in tensors.values()) == model.config.num_params()
    pools = [name for name in tensors if name.endswith(".up")]
    expected = {"none": 4, "residual": 4, "bottom": 3}.get(model.config.sharing, 1)
    assert len(pools) == expected


FRESH = """
import copy
import sys
import torch
import smelt
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

folder = sys.argv[1]
ids = torch.load(f"{folder}/ids.pt")
for kind, auto in (("causal", AutoModelForCausalLM), ("masked", AutoModelForMaskedLM)):
    model = copy.deepcopy(auto.from_pretrained(f"{folder}/{kind}"))  # see `identical`
    with torch.no_grad():
        torch.save(model(ids).logits, f"{folder}/{kind}.pt")
"""


def test_a_fresh_process_that_imports_smelt_loads_both_kinds_with_identical_logits(tmp_path):
    causal, masked = build(tiny("modern")), build(tiny(), SaMoEForMaskedLM)
    causal.save_pretrained(tmp_path / "causal")
    masked.save_pretrained(tmp_path / "masked")
    torch.save(IDS, tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "causal.pt"), logits(causal, IDS))
    assert torch.equal(torch.load(tmp_path / "masked.pt"), logits(masked, IDS))


def test_the_auto_classes_know_every_kind(tmp_path):
    build(tiny()).save_pretrained(tmp_path)
    kinds = {
        AutoModel: SaMoEModel,
        AutoModelForCausalLM: SaMoEForCausalLM,
        AutoModelForSequenceClassification: SaMoEForSequenceClassification,
    }
    for auto, kind in kinds.items():
        assert type(auto.from_pretrained(tmp_path)) is kind


def test_embeddings_are_tied_unless_asked_and_stay_so(tmp_path):
    for is_tied in (True, False):
        model = build(tiny(tie_word_embeddings=is_tied))
        model.save_pretrained(tmp_path / str(is_tied))
        for one in (model, SaMoEForCausalLM.from_pretrained(tmp_path / str(is_tied))):
            assert (one.lm_head.weight is one.model.embed_tokens.weight) == is_tied
    model.resize_token_embeddings(40)
    assert logits(model, IDS).shape == (2, 8, 40)


def test_loading_does_not_draw_alpha_anew(tmp_path):
    model = build(tiny(alpha_scope="expert"))
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel):
        torch.manual_seed(3)
        loaded = auto.from_pretrained(tmp_path)
        backbone = getattr(loaded, "model", loaded)
        for mine, theirs in zip(model.model.moe_layers(), backbone.moe_layers(), strict=True):
            assert torch.equal(mine.alpha, theirs.alpha) and torch.equal(mine.beta, theirs.beta)


def test_a_part_that_a_checkpoint_lacks_begins_and_the_rest_is_loaded(tmp_path):
    without = build(tiny(use_beta=False, alpha_scope="matrix"))
    without.save_pretrained(tmp_path)
    loaded = SaMoEForCausalLM.from_pretrained(tmp_path, use_beta=True)
    theirs = loaded.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in without.state_dict().items())
    assert all(layer.beta == 1 for layer in loaded.model.moe_layers())


def test_half_precision_is_loaded_on_request(tmp_path):
    model = build(tiny("modern", num_experts_per_tok=4))  # all: rounding moves no choice
    model.save_pretrained(tmp_path)
    half = SaMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    found, expected = logits(half, IDS).float(), logits(model, IDS)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_importing_smelt_leaves_the_packages_their_names():
    import smelt.samoe.config as by_name

    assert smelt.samoe is sys.modules["smelt.samoe"]
    assert by_name.SaMoEConfig is AutoConfig.for_model("samoe").__class__


# --- causal and masked ---------------------------------------------------------------------------


def test_a_masked_model_leaves_the_configuration_it_is_given():
    config = tiny()
    masked = SaMoEForMaskedLM(config)
    assert config.is_causal and not masked.config.is_causal and not masked.model.config.is_causal
    assert SaMoEForCausalLM(config).config.is_causal


def test_a_masked_checkpoint_is_no_causal_model(tmp_path):
    build(tiny(), SaMoEForMaskedLM).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"is_causal = False: .*SaMoEForMaskedLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert not loaded.config.is_causal


def test_a_masked_model_may_begin_from_causal_weights_and_says_so(tmp_path, caplog):
    model = build(tiny())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert "trained to predict the next token" in caplog.text
    assert all(torch.equal(p, loaded.state_dict()[n]) for n, p in model.state_dict().items())
    assert not torch.allclose(logits(loaded, IDS), logits(model, IDS), atol=1e-2)
    caplog.clear()
    loaded.save_pretrained(tmp_path / "masked")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "masked")
    SaMoEForMaskedLM(tiny())
    assert not caplog.text


@pytest.mark.parametrize("kind", [SaMoEForCausalLM, SaMoEForMaskedLM])
def test_a_classifier_takes_the_backbone_and_reads_real_tokens_only(kind, tmp_path):
    build(tiny(), kind).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.config.is_causal == (kind is SaMoEForCausalLM)
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    found = model(IDS, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert found.logits.shape == (2, 3) and found.loss.isfinite()
    torch.testing.assert_close(found.logits[1:], model(IDS[1:, :5]).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits[:1], model(IDS[:1]).logits, rtol=0, atol=1e-5)


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks by transformers' older names
def test_low_rank_adapters_train_and_save(tmp_path):
    peft = pytest.importorskip("peft")
    model = build(tiny("modern"))
    before = logits(model, IDS)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    )
    torch.testing.assert_close(logits(adapted, IDS), before)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        trained = {n for n, p in adapted.named_parameters() if p.grad is not None}
        assert trained and all("lora" in name for name in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(tiny("modern")), tmp_path)
    torch.testing.assert_close(logits(again.eval(), IDS), logits(adapted.eval(), IDS))
    assert not torch.allclose(logits(again, IDS), before, atol=1e-3)
