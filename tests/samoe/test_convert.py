"""Laws of the way out: frozen, a SaMoE model computes what it did, in a family without pools."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM

from checkpoints import randomise, save
from commands import QUICK, contents, smelt, text_file, tokenizer
from smelt.checkpoint.shards import list_tensors
from smelt.checkpoint.sink import Sink
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CheckpointError, PlanError, RecipeError
from smelt.samoe.config import SaMoEConfig
from smelt.samoe.convert import Exported, export
from smelt.samoe.freeze import check_expressible, freeze_experts, frozen_config, stream_products
from smelt.samoe.model import (
    SaMoEForCausalLM,
    SaMoEForMaskedLM,
    SaMoEForSequenceClassification,
)
from smelt.samoe.pool import Alpha, PoolWeights, pooled_experts

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "vocab_size": 96,
    "initializer_range": 0.2,
}
BETAS = (0.8, -1.3, 1.1, 0.7)  # ∏: 0.8, −1.04, −1.14, −0.80: negative at the end as well
NO_EPS = 1e-12
"""A norm's ε so small that it is nothing: what is left is rounding."""
ROUNDING = 1e-5
"""Of float32 logits of standard deviation 1.45; measured 1.4e-6 to 3.8e-6."""


def make(betas: tuple[float, ...] = BETAS, *, seed: int = 0, **fields: Any) -> SaMoEForCausalLM:
    """A tiny model of the modern preset with every tensor random, its β as given (and repeated)."""
    torch.manual_seed(seed)
    config = SaMoEConfig.from_preset("modern", **{**TINY, "norm_eps": NO_EPS, **fields})
    model = SaMoEForCausalLM(config).eval()
    randomise(model)
    with torch.no_grad():
        for i, layer in enumerate(model.model.moe_layers()):
            if layer.beta is not None:
                layer.beta.fill_(betas[i % len(betas)])
    return model


def frozen(model: PreTrainedModel, folder: Path, **options: Any) -> Exported:
    """The model saved in `folder/source` and exported to `folder/out`."""
    model.save_pretrained(folder / "source")
    return export(folder / "source", folder / "out", **options)


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, TINY["vocab_size"], (batch, length), generator=generator)


@torch.no_grad()
def logits(model: Any, **inputs: Tensor) -> Tensor:
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model).eval()
    return model(**(inputs or {"input_ids": tokens()})).logits.float()


def difference(model: SaMoEForCausalLM, folder: Path) -> float:
    """The largest difference of a logit between a model and its export."""
    return float((logits(model) - logits(frozen(model, folder).folder)).abs().max())


# --- the same function ---------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    **{
        f"{mix}-{scope}": {"mix": mix, "alpha_scope": scope}
        for mix in ("activation", "weight")
        for scope in ("layer", "expert", "matrix")
    },
    "hard": {"mix": "hard"},
    "three-entries": {"pool_size": 3},
    "one-entry": {"pool_size": 1},
    "top-1": {"num_experts_per_tok": 1},
    "top-1-normalised": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "top-2-normalised": {"norm_topk_prob": True},
    "capacity-acts-in-training-only": {"capacity_factor": 0.25},
    "every-second-block": {"moe_every": 2},
    "every-third-block": {"moe_every": 3, "num_hidden_layers": 7},
    "one-moe-layer": {"moe_every": 4},
    "shared-router": {"shared_router": True},
    "untied": {"tie_word_embeddings": False},
    "without-beta": {"use_beta": False},
    "frozen-alpha": {"train_alpha": False, "alpha_init": "group"},
    "gelu": {"hidden_act": "gelu"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "none": {"sharing": "none"},
    "all": {"sharing": "all"},
    "groups": {"sharing": "groups"},
    "bottom": {"sharing": "bottom"},
    "top": {"sharing": "top"},
    "union": {"sharing": "union"},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_an_export_computes_what_the_model_did(fields, tmp_path):
    model = make(**fields)
    done = frozen(model, tmp_path)
    out = AutoModelForCausalLM.from_pretrained(done.folder).eval()
    assert isinstance(out, Qwen3MoeForCausalLM)
    assert float((logits(model) - logits(out)).abs().max()) < ROUNDING
    # and the sizes that were promised by formula are those of the files
    before, after = list_tensors(tmp_path / "source"), list_tensors(done.folder)
    assert done.bytes_before == sum(entry.num_bytes for entry in before.values())
    assert done.bytes_after == sum(entry.num_bytes for entry in after.values())
    assert done.params_before == sum(p.numel() for p in model.parameters())
    assert done.params_after == sum(p.numel() for p in out.parameters())


@pytest.mark.parametrize("seed", range(4))
def test_beta_of_any_size_and_sign_is_exact_where_the_norms_have_no_epsilon(seed, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (4,), generator=generator) * 2 - 1
    betas = tuple(((0.3 + 2 * torch.rand(4, generator=generator)) * sign).tolist())
    model = make(betas, seed=seed, moe_every=1 + seed % 2)
    assert difference(model, tmp_path) < ROUNDING


def test_with_epsilon_beta_costs_what_epsilon_does(tmp_path):
    # The error is first-order in ε. Of these logits (standard deviation 1.45) measured
    # 4.65e-4 at 1e-4 and 4.60e-5 at 1e-5.
    found = [difference(make(norm_eps=eps), tmp_path / str(eps)) for eps in (1e-4, 1e-5)]
    assert ROUNDING < found[1] < 2e-4
    assert found[0] / found[1] == pytest.approx(10, rel=0.5)


def test_without_beta_epsilon_costs_nothing(tmp_path):
    assert difference(make(use_beta=False, norm_eps=1e-2), tmp_path) < ROUNDING


def test_padding_changes_no_real_token(tmp_path):
    model = make()
    out = AutoModelForCausalLM.from_pretrained(frozen(model, tmp_path).folder).eval()
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 17:] = 0
    both = [logits(m, input_ids=tokens(), attention_mask=mask)[mask.bool()] for m in (model, out)]
    assert float((both[0] - both[1]).abs().max()) < ROUNDING


def test_an_export_generates_the_same_text(tmp_path):
    model = make()
    out = AutoModelForCausalLM.from_pretrained(frozen(model, tmp_path).folder).eval()
    words = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(tokens()[:, :6], **words), out.generate(tokens()[:, :6], **words)
    )


# --- α alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["activation", "weight"])
@pytest.mark.parametrize("scope", ["down", "all"])
def test_folding_alpha_is_exact_up_to_float64_rounding(mix, scope, generator):
    E, P, F, D = 3, 2, 8, 16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    up, down, gate = draw(E, P * F, D), draw(E, D, P * F), draw(E, P * F, D)
    weights = PoolWeights(up, down, gate, None, None, None, P, torch.nn.functional.silu)
    inner = (draw(E, P), draw(E, P)) if scope == "all" or mix == "weight" else (None, None)
    alpha = Alpha(*inner, draw(E, P))
    x, sizes = draw(30, D), torch.tensor([2, 0, 28])  # few rows and many: the kernel has two ways
    expected = pooled_experts(weights, x, sizes, alpha, mix=mix)
    one = freeze_experts(weights, alpha, mix=mix, divisor=-0.37)
    assert one.hidden_size == (P * F if mix == "activation" else F)
    found = -0.37 * pooled_experts(one, x, sizes, None, mix="activation")
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-14


def test_a_power_of_two_as_alpha_loses_no_bit(tmp_path):
    model = make(use_beta=False)
    with torch.no_grad():
        for layer in model.model.moe_layers():
            layer.alpha.copy_(torch.tensor([0.25, -2.0]))
    out = AutoModelForCausalLM.from_pretrained(frozen(model, tmp_path).folder)
    pool, experts = model.model.pools[0], out.model.layers[2].mlp.experts
    factor = torch.tensor([0.25, -2.0]).repeat_interleave(16)
    assert torch.equal(experts.down_proj, pool.down * factor)
    assert torch.equal(experts.gate_up_proj, torch.cat([pool.gate, pool.up], 1))


# --- an ordinary checkpoint ----------------------------------------------------------------------

LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert AutoTokenizer.from_pretrained(sys.argv[1])("def f").input_ids
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
assert not [name for name in sys.modules if name.split(".")[0] == "smelt"]
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, a SaMoE model with a tokenizer, and `out`, its export by the command."""
    folder = tmp_path_factory.mktemp("ground")
    make(vocab_size=300, moe_every=2).save_pretrained(folder / "source")
    tokenizer(folder).save_pretrained(folder / "source")
    done = smelt("export", folder / "source", folder / "out", "--json")
    assert done.code == 0, done.err
    (folder / "said.json").write_text(done.out)
    return folder


def test_an_export_loads_without_smelt_in_a_fresh_process(ground, tmp_path):
    torch.save(tokens(), tmp_path / "tokens.pt")
    subprocess.run(
        [sys.executable, "-c", LOADS, ground / "out", tmp_path / "tokens.pt", tmp_path / "l.pt"],
        check=True,
    )
    model = SaMoEForCausalLM.from_pretrained(ground / "source").eval()
    assert float((torch.load(tmp_path / "l.pt") - logits(model)).abs().max()) < ROUNDING


def test_an_export_lies_on_disk_as_the_family_writes_it(ground, tmp_path):
    out = Qwen3MoeForCausalLM.from_pretrained(ground / "out")
    out.save_pretrained(tmp_path / "again")
    ours, theirs = (list_tensors(f) for f in (ground / "out", tmp_path / "again"))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    read = [
        json.loads((f / "config.json").read_text()) for f in (ground / "out", tmp_path / "again")
    ]
    assert read[1].items() <= read[0].items()
    assert read[0]["num_experts"] == 4 and read[0]["rope_theta"] == 10_000.0  # older readers


def test_an_export_has_all_that_lies_beside_the_weights(ground):
    beside = {file.name for file in (ground / "source").iterdir()} - {"model.safetensors"}
    assert {"tokenizer.json", "generation_config.json"} <= beside
    assert beside <= {file.name for file in (ground / "out").iterdir()}
    made = json.loads((ground / "out" / "smelt" / "provenance.json").read_text())
    assert made["source_fingerprint"] == Checkpoint.open(ground / "source").fingerprint
    assert made["export"]["to"] == "qwen3_moe" and made["settings"]["mix"] == "activation"
    said = json.loads((ground / "said.json").read_text())
    for name in ("params_before", "params_after", "bytes_before", "bytes_after", "beta_products"):
        assert made["export"][name] == said[name]
    assert said["experts_before"] == 2 * 4 and said["experts_after"] == 2 * 4


def test_inspect_and_compress_take_an_export(ground, tmp_path):
    about = smelt("inspect", ground / "out", "--verify", "--json").json
    assert about["family"] == "qwen3_moe" and about["num_experts"] == [4, 4]
    assert about["num_dense_blocks"] == 2 and about["verified_files"] == about["num_files"]
    said = json.loads((ground / "said.json").read_text())
    assert (about["num_params"], about["num_bytes"]) == (said["params_after"], said["bytes_after"])
    words = ("--keep", 0.5, "--text", text_file(ground), *QUICK)
    done = smelt("compress", ground / "out", tmp_path / "small", *words)
    assert done.code == 0, done.err
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.model.layers[1].mlp.experts.down_proj.shape == (2, 32, 2 * 16)
    assert small.config.num_experts == 2 and bool(logits(small).isfinite().all())


def test_the_command_says_how_much_larger_the_result_is(ground, tmp_path):
    done = smelt("export", ground / "source", tmp_path / "o", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert "8 stored experts written out as 8 (qwen3_moe)" in done.out
    assert "parameters (" in done.out and "in bfloat16" in done.out
    assert "-1.04 to 1" in done.out  # ∏β
    assert f"smelt compress {tmp_path / 'o'} OUT" in done.out


def test_every_tensor_is_rounded_once(tmp_path):
    model = make()
    wide = load_all(frozen(model, tmp_path).folder)
    narrow = load_all(export(tmp_path / "source", tmp_path / "narrow", dtype="bfloat16").folder)
    assert wide.keys() == narrow.keys()
    assert all(torch.equal(narrow[key], wide[key].bfloat16()) for key in wide)
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert export(tmp_path / "half", tmp_path / "as-it-was").dtype == "bfloat16"


def load_all(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_freezing_the_papers_model_costs_what_the_formula_says():
    # METHODS section 6: SaMoE-12L, 0.70B → 3.7B; no stock family has its settings.
    paper = SaMoEConfig.from_preset(
        "paper", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_experts=64
    )
    assert paper.num_params() / 1e9 == pytest.approx(0.70, abs=0.005)
    assert frozen_config(paper).num_params() / 1e9 == pytest.approx(3.7, abs=0.05)
    assert paper.sharing == "pool" and paper.use_beta  # the original is left as it is


# --- what cannot be ------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "position_embedding = 'learned'": {"position_embedding": "learned"},
    "norm = 'layer'": {"norm": "layer"},
    "is_gated = false": {"is_gated": False},
    "has_bias = true": {"has_bias": True},
    "qk_norm = false": {"qk_norm": False},
    "is_causal = false": {"is_causal": False},
    "sharing = 'dense'": {"sharing": "dense"},
    "sharing = 'pyramid'": {"sharing": "pyramid"},
    "sharing = 'residual'": {"sharing": "residual"},
}


@pytest.mark.parametrize(("name", "fields"), REFUSED.items(), ids=REFUSED)
def test_a_setting_the_family_has_no_place_for_is_named(name, fields):
    config = SaMoEConfig.from_preset("modern", **{**TINY, **fields})
    with pytest.raises(PlanError, match="runs/a: cannot be exported") as refused:
        check_expressible(config, ["SaMoEForCausalLM"], where="runs/a")
    others = [other for other in REFUSED if other != name and other in str(refused.value)]
    assert f"{name} (" in str(refused.value) and not others


def test_the_paper_preset_is_refused_with_every_reason_before_anything_is_written(tmp_path):
    SaMoEForCausalLM(SaMoEConfig.from_preset("paper", **TINY)).save_pretrained(tmp_path / "source")
    done = smelt("export", tmp_path / "source", tmp_path / "out")
    assert done.code == 2 and not done.out
    for name in ("position_embedding", "norm = 'layer'", "is_gated", "has_bias", "qk_norm"):
        assert name in done.err
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", [SaMoEForMaskedLM, SaMoEForSequenceClassification])
def test_only_what_predicts_the_next_token_is_exported(kind, tmp_path):
    kind(SaMoEConfig.from_preset("modern", **TINY)).save_pretrained(tmp_path / "source")
    with pytest.raises(PlanError, match=kind.__name__):
        export(tmp_path / "source", tmp_path / "out")


def test_an_ordinary_checkpoint_needs_no_export(tmp_path):
    save("mixtral", tmp_path / "source")
    with pytest.raises(PlanError, match="is of family mixtral"):
        export(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("option", [{"to": "mixtral"}, {"dtype": "int8"}])
def test_an_unknown_option_lists_those_there_are(option, tmp_path):
    with pytest.raises(RecipeError, match="it is one of"):
        frozen(make(), tmp_path, **option)


def test_stream_products_are_running_ones():
    assert stream_products([None, 2.0, None, -0.25]) == [1.0, 1.0, 2.0, 2.0, -0.5]


@pytest.mark.parametrize("betas", [[1.0, 0.0], [1e-5], [-0.05] * 4, [1.0, float("nan")]])
def test_a_stream_that_is_all_but_forgotten_cannot_be_frozen(betas):
    with pytest.raises(PlanError, match=f"β of block {len(betas) - 1} is"):
        stream_products(betas)


def test_a_beta_near_zero_leaves_nothing_behind(tmp_path):
    with pytest.raises(PlanError, match="β of block 1"):
        frozen(make((0.9, 1e-6)), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


# --- whole or not at all -------------------------------------------------------------------------


def test_an_output_that_exists_stays_as_it_is(ground, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    done = smelt("export", ground / "source", tmp_path / "out")
    assert done.code == 2 and "exists" in done.err
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine.txt"]
    with pytest.raises(CheckpointError, match="inside the source"):
        export(ground / "source", ground / "source" / "out")


def test_an_export_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    whole = frozen(make(), tmp_path)
    write, written = Sink.write, []

    def stops(sink: Sink, index: int, *rest: Any) -> None:
        if index == 2 and 2 not in written:
            written.append(index)
            raise KeyboardInterrupt
        written.append(index)
        write(sink, index, *rest)

    monkeypatch.setattr(Sink, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "source", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    export(tmp_path / "source", tmp_path / "again")
    assert written == [0, 1, 2, 2, 3, 4]  # what was whole is not made again
    assert contents(tmp_path / "again") == contents(whole.folder)
    assert not (tmp_path / "again.partial").exists()


@pytest.mark.parametrize("name", ["layers.2.attention.v_proj.weight", "pools.0.up"])
def test_damaged_weights_are_named_and_leave_nothing_behind(name, tmp_path):
    model = make()
    with torch.no_grad():
        model.model.get_parameter(name).view(-1)[3] = float("nan")
    with pytest.raises(CheckpointError, match="has NaN or Inf"):
        frozen(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_weights_beyond_float16_say_which_type_holds_them(tmp_path):
    with pytest.raises(PlanError, match="Choose --dtype bfloat16 or float32"):
        frozen(make((2e-4, 1.0, 1.0, 1.0), initializer_range=20.0), tmp_path, dtype="float16")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_progress_counts_every_shard(tmp_path):
    seen: list[tuple[str, int, int]] = []
    done = frozen(make(), tmp_path, progress=lambda *one: seen.append(one))
    assert [one[1:] for one in seen] == [(i, 5) for i in range(1, 6)]
    assert asdict(done)["beta_products"] == pytest.approx([1, 0.8, -1.04, -1.144, -0.8008])
