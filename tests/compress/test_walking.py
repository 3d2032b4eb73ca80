"""Laws of a compression that fits its layers while the model is walked."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from checkpoint.test_every_family import tiny_model
from compress.laws import Ground, dies_after
from every_family import experts_classes
from reference.reconstruction import relative_error
from smelt.checkpoint.inputs import Batch
from smelt.compress.apply import apply
from smelt.compress.capture import Chosen
from smelt.compress.plan import Plan
from smelt.compress.reconstructor import Reconstructor
from smelt.compress.walking import apply_walking
from smelt.errors import PlanError

QUICK = {"steps": 25, "batch_tokens": 64, "target": "layer", "closed_form": True}
TOKENS = torch.randint(3, 90, (16, 80), generator=torch.Generator().manual_seed(2))
FIT = Reconstructor.fit
MORE = {**QUICK, "steps": 100}
TARGETS = ("layer", "sequential", "corrected")


def batches(size: int, *, padding: int = 0) -> list[Batch]:
    """The tokens, `size` sequences at a time, with padding behind them."""
    ids = torch.nn.functional.pad(TOKENS, (0, padding))
    mask = torch.nn.functional.pad(torch.ones_like(TOKENS, dtype=torch.bool), (0, padding))
    return [
        Batch({"input_ids": i, "attention_mask": m.long()}, m)
        for i, m in zip(ids.split(size), mask.split(size), strict=True)
    ]


def two_sided() -> list[Batch]:
    """The same for an encoder–decoder."""
    return [
        Batch({"input_ids": ids, "decoder_input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))
        for ids in TOKENS.split(4)
    ]


def compress(ground: Ground, out: Path, given: list[Batch] | None = None, **settings) -> Path:
    return apply_walking(
        ground.checkpoint,
        ground.plan(out, **settings),
        out,
        batches=given or batches(4),
        stats=ground.stats,
        facts=ground.facts,
    )


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground.make(tmp_path_factory.mktemp("source"), num_hidden_layers=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fits(folder: Path):
    layers = Plan.load(folder / "smelt" / "plan.json").layers
    return {layer.name: layer.fit for layer in layers if layer.fit is not None}


def comes_nearer(folder: Path) -> bool:
    """Whether no layer is further from what it did than before its fit, and their sum nearer.

    Random experts have little in common: of few tokens, a single layer may find nothing.
    """
    found = fits(folder).values()
    return all(f.after <= f.before for f in found) and sum(f.after for f in found) < 0.99 * sum(
        f.before for f in found
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


class Seen:
    """What a model's blocks and MoE modules read and give, for all tokens of the batches."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.into: dict[str, torch.Tensor] = {}
        self.out: dict[str, torch.Tensor] = {}
        for name, module in self.model.named_modules():
            if name.endswith(".mlp") or name.rpartition(".")[2].isdigit():
                module.register_forward_hook(self._keep(name), with_kwargs=True)
        with torch.no_grad():
            self.logits = self.model(TOKENS).logits

    def _keep(self, name):
        def hook(_, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            self.into[name] = x.reshape(-1, x.shape[-1])
            first = output[0] if isinstance(output, tuple) else output
            self.out[name] = first.reshape(-1, first.shape[-1])

        return hook

    def moe(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """What MoE module `layer` gives for tokens [N, D]."""
        with torch.no_grad():
            found = self.model.get_submodule(f"model.layers.{layer}.mlp")(x[:, None])
        first = found[0] if isinstance(found, tuple) else found
        return first.reshape(x.shape)


HELD = (torch.arange(len(TOKENS)) >= 12).repeat_interleave(TOKENS.shape[1])  # the last quarter


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("settings", [{"form": "stock"}, {"form": "mapped"}], ids=str)
def test_the_errors_of_a_fit_are_those_of_the_checkpoint_it_made(
    ground, tmp_path, settings, target
):
    """Held-out error of every layer: recomputed from both models, loaded by transformers."""
    recipe = {**QUICK, "target": target, "held_out": 0.25}
    out = compress(ground, tmp_path / "out", reconstruct=recipe, **settings)
    first, new = Seen(ground.folder), Seen(out)
    for number, found in enumerate(fits(out).values()):
        name = f"model.layers.{number}"
        if target == "layer":
            x = first.into[f"{name}.mlp"]
            wanted = first.out[f"{name}.mlp"]
        else:
            x = new.into[f"{name}.mlp"]
            wanted = first.moe(number, x)
        if target == "corrected":  # the block's output, less what the block has without its experts
            wanted = first.out[name] - (new.out[name] - new.out[f"{name}.mlp"])
        y = new.moe(number, x)
        assert found.after == pytest.approx(relative_error(y[HELD], wanted[HELD]), rel=2e-3)
    assert len(fits(out)) == 3
    assert comes_nearer(out)


@pytest.mark.parametrize("target", TARGETS)
def test_a_fit_changes_no_byte_count_and_only_what_it_is_asked_to(ground, tmp_path, target):
    plain = tensors(ground.compress(tmp_path / "plain", form="stock"))
    both = {"router": True, "experts": True}
    for name in ({**both}, {**both, "router": False}, {**both, "experts": False}):
        label = "-".join(k for k, v in name.items() if v)
        out = compress(
            ground, tmp_path / label, form="stock", reconstruct={**QUICK, "target": target, **name}
        )
        found = tensors(out)
        assert {k: (t.shape, t.dtype) for k, t in found.items()} == {
            k: (t.shape, t.dtype) for k, t in plain.items()
        }
        changed = {k for k, t in found.items() if not torch.equal(t, plain[k])}
        allowed = {
            k
            for k in plain
            if (name["experts"] and ".experts." in k) or (name["router"] and ".mlp.gate." in k)
        }
        assert changed <= allowed
        for part in (".experts.", ".mlp.gate."):
            assert any(part in k for k in changed) == any(part in k for k in allowed)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "switch_transformers"])
@pytest.mark.parametrize("form", ["stock", "mapped"])
def test_layers_of_other_families_are_fitted_too(tmp_path, family, form):
    given = two_sided() if family.startswith("switch") else None
    made = Ground.make(tmp_path / "source", family, given)
    recipe = {**QUICK, "target": "layer"}
    out = compress(made, tmp_path / "out", given, form=form, reconstruct=recipe)
    found = fits(out)
    assert len(found) == len(made.facts.layers)
    assert comes_nearer(out)
    auto = AutoModelForSeq2SeqLM if family.startswith("switch") else AutoModelForCausalLM
    model = auto.from_pretrained(out)
    inputs = {"decoder_input_ids": TOKENS} if family.startswith("switch") else {}
    with torch.no_grad():
        assert model.eval()(input_ids=TOKENS, **inputs).logits.isfinite().all()


def test_biases_stay_where_they_are_not_fitted(tmp_path):
    made = Ground.make(tmp_path / "source", "gpt_oss")
    plain = tensors(made.compress(tmp_path / "plain", form="stock"))
    for fits_biases in (True, False):
        out = compress(
            made,
            tmp_path / str(fits_biases),
            form="stock",
            reconstruct={**QUICK, "biases": fits_biases},
        )
        changed = {k for k, t in tensors(out).items() if not torch.equal(t, plain[k])}
        assert any(k.endswith("_proj") for k in changed)
        assert any("bias" in k for k in changed) == fits_biases


def test_tokens_kept_in_sixteen_bits_give_nearly_the_same_fit(ground, tmp_path):
    found = [
        [f.after for f in fits(out).values()]
        for out in (
            compress(ground, tmp_path / s, form="stock", reconstruct={**QUICK, "states": s})
            for s in ("model", "bfloat16")
        )
    ]
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert found[0] != found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("target", TARGETS)
def test_a_gpu_fits_what_the_cpu_does(ground, tmp_path, target):
    settings = {"form": "stock", "reconstruct": {**QUICK, "target": target}}
    here = compress(ground, tmp_path / "cpu", **settings)
    there = apply_walking(
        ground.checkpoint,
        ground.plan(tmp_path / "gpu", **settings),
        tmp_path / "gpu",
        batches=batches(4),
        stats=ground.stats,
        facts=ground.facts,
        device="cuda",
    )
    errors = [[f.after for f in fits(folder).values()] for folder in (here, there)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_some_sequences_are_held_out_and_some_are_not(share):
    masks = [torch.ones(4, 10, dtype=torch.bool)] * 4
    held_out = Chosen.of(masks, None, share).held_out
    assert 0 < int(held_out.sum()) < len(held_out)
    if share * 16 >= 1:  # the last sequences, whole
        assert held_out.view(16, 10).all(1).tolist() == sorted(
            held_out.view(16, 10).any(1).tolist()
        )


def test_decomposed_experts_and_fewer_hidden_units_are_fitted_too(ground, tmp_path):
    factored = compress(
        ground,
        tmp_path / "factored",
        form="mapped",
        decompose={"rank": 4, "keep": 0.1},
        reconstruct=QUICK,
    )
    smaller = Ground.make(tmp_path / "wide", moe_intermediate_size=48)
    narrow = compress(
        smaller, tmp_path / "narrow", form="stock", experts=8, hidden_units=16, reconstruct=MORE
    )
    for folder in (factored, narrow):
        assert fits(folder)
        assert comes_nearer(folder)
    plan = Plan.load(factored / "smelt" / "plan.json")
    assert sum(t.nbytes for t in tensors(factored).values()) == plan.predicted.bytes_after


def test_layers_that_lose_nothing_are_left_alone(ground, tmp_path):
    out = compress(
        ground, tmp_path / "out", form="mapped", budget="global", excluded=(1,), reconstruct=QUICK
    )
    assert list(fits(out)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    before, after = tensors(ground.folder), tensors(out)
    gate = "model.layers.1.mlp.gate.weight"
    assert torch.equal(before[gate], after[gate])


@pytest.mark.parametrize("target", TARGETS)
def test_batch_size_and_padding_change_a_fit_by_rounding_alone(ground, tmp_path, target):
    plan = ground.plan(tmp_path / "out", form="stock", reconstruct={**QUICK, "target": target})
    shared = {"stats": ground.stats, "facts": ground.facts}
    found = [
        apply_walking(ground.checkpoint, plan, tmp_path / str(i), batches=given, **shared)
        for i, given in enumerate((batches(2), batches(8), batches(4, padding=5)))
    ]
    errors = [[f.after for f in fits(folder).values()] for folder in found]
    for other in errors[1:]:
        assert other == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("moment", [0, 2])
def test_a_killed_run_resumed_gives_the_bytes_of_an_uninterrupted_one(
    ground, tmp_path, monkeypatch, target, moment
):
    settings = {"form": "stock", "reconstruct": {**QUICK, "target": target}}
    whole = contents(compress(ground, tmp_path / "out", **settings))
    (tmp_path / "out").rename(tmp_path / "whole")
    with dies_after(monkeypatch, moment):
        compress(ground, tmp_path / "out", **settings)
    fitted = []
    monkeypatch.setattr(
        "smelt.compress.reconstructor.Reconstructor.fit",
        lambda self, layer, *rest: (fitted.append(layer.name), FIT(self, layer, *rest))[1],
    )
    assert contents(compress(ground, tmp_path / "out", **settings)) == whole
    kept = moment if target == "layer" else moment + 1  # the shard of the last was not written
    assert len(fitted) == 3 - kept


def test_sequential_decisions_and_fits_go_together(ground, tmp_path):
    recipe = {**QUICK, "target": "sequential"}
    out = compress(ground, tmp_path / "out", form="stock", sequential=True, reconstruct=recipe)
    assert comes_nearer(out)
    plain = compress(ground, tmp_path / "plain", form="stock", sequential=True)
    first, second = (Plan.load(folder / "smelt" / "plan.json").layers[0] for folder in (out, plain))
    assert first.labels == second.labels


@pytest.mark.filterwarnings("ignore:.*numbers for each")
def test_a_plan_can_be_fitted_to_the_inputs_that_the_statistics_keep(ground, tmp_path):
    recipe = {"steps": 25, "batch_tokens": 16, "inputs": "sample"}
    plan = ground.plan(tmp_path / "out", form="stock", reconstruct=recipe)
    with pytest.raises(PlanError, match="--stats"):
        apply(ground.checkpoint, plan, tmp_path / "without")
    out = apply(ground.checkpoint, plan, tmp_path / "out", stats=ground.stats)
    assert comes_nearer(out)
    again = apply(ground.checkpoint, plan, tmp_path / "again", stats=ground.stats)
    assert contents(out) == contents(again)
    x = ground.stats.layers["model.layers.0.mlp"].input_sample
    held = torch.arange(len(x)) % 10 == 9
    y, wanted = Seen(out).moe(0, x), Seen(ground.folder).moe(0, x)
    found = fits(out)["model.layers.0.mlp"]
    assert found.after == pytest.approx(relative_error(y[held], wanted[held]), rel=2e-3)


def test_a_block_that_changes_its_experts_output_is_fitted_to_its_own_inputs(tmp_path):
    """Blocks of FlexOlmo normalise what the experts give: no output of the block is a target."""
    kind = next(each for each in experts_classes() if each.name == "FlexOlmoExperts")
    made = Ground.of(tiny_model(kind), tmp_path / "source")
    by_default = {k: v for k, v in QUICK.items() if k != "target"}
    out = compress(made, tmp_path / "out", form="stock", reconstruct=by_default)
    same = compress(
        made, tmp_path / "same", form="stock", reconstruct={**QUICK, "target": "sequential"}
    )
    assert [f.after for f in fits(out).values()] == [f.after for f in fits(same).values()]
    with pytest.raises(PlanError, match="Use target: sequential"):
        compress(made, tmp_path / "no", form="stock", reconstruct={**QUICK, "target": "corrected"})
    assert not (tmp_path / "no.partial").exists()


def test_a_diverging_fit_is_reported_and_the_run_goes_on(ground, tmp_path):
    recipe = {**QUICK, "rate": 1e30, "closed_form": False}
    with pytest.warns(UserWarning, match="diverged"):
        out = compress(ground, tmp_path / "out", form="stock", reconstruct=recipe)
    assert all(f.ended == "diverged" and f.after <= f.before for f in fits(out).values())
    plain = tensors(ground.compress(tmp_path / "plain", form="stock"))
    assert all(torch.equal(t, plain[k]) for k, t in tensors(out).items())


def test_too_few_tokens_are_warned_of_with_the_ratio(ground, tmp_path):
    with pytest.warns(UserWarning, match=r"numbers for each"):
        compress(ground, tmp_path / "out", form="stock", reconstruct={**QUICK, "tokens": 64})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "expanded", "reconstruct": {}}, "mapped form"),
        ({"sequential": True, "reconstruct": {"target": "layer"}}, "sequential or corrected"),
        ({"reconstruct": {"inputs": "sample", "target": "corrected"}}, "original stream"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_read(
    ground, tmp_path, settings, message
):
    with pytest.raises(PlanError, match=message):
        ground.plan(tmp_path / "out", **settings)
