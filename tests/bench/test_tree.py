"""Bytes and experts of a step are those that a slow look at every operation finds."""

import pytest
import torch

import checkpoints
import every_family
from material import Material
from reference.reads import Reads
from smelt.bench.cells import see
from smelt.bench.reached import reached
from smelt.bench.state import State
from smelt.bench.subjects import load, subject
from smelt.bench.tree import _Reads
from smelt.checkpoint import mapped
from smelt.checkpoint.describe import describe
from smelt.checkpoint.source import Checkpoint

CPU = torch.device("cpu")
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss", "minimax", "jamba", "qwen3_next")
BATCH, CONTEXT = 3, 20


def drawn(*shape, seed=0):
    return torch.randint(
        3, checkpoints.VOCABULARY, shape, generator=torch.Generator().manual_seed(seed)
    )


def model_of(family):
    model = checkpoints.random_model(checkpoints.tiny_config(family))
    model.set_experts_implementation("eager")  # one product for each expert: seen one by one
    return model


def step_of(one, batch=BATCH, context=CONTEXT):
    """The predicted work of a step, and the values of parameters that it reads."""
    ids, token = drawn(batch, context), drawn(batch, 1, seed=1)

    def stepped(state):
        state.step(token)
        state.back()

    with torch.no_grad():
        state = State(one.model, ids, batch)
        seen = see(one, [lambda: stepped(state)], state.cached_values)
        with Reads(one.model) as reads:
            state.step(token)
    return one.cost.step(batch, context, seen.hit, None, seen), seen, reads.total()


def forms(folder):
    """The same layers mapped, and mapped and decomposed."""
    ground = Material(checkpoints.save("mixtral", folder / "m"))
    settings = {"form": "mapped", "experts": 3, "align": "none"}
    yield "mapped", ground.compress(folder / "mapped", **settings)
    decompose = {"rank": 4, "keep": 0.2}
    yield "decomposed", ground.compress(folder / "low", **settings, decompose=decompose)


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_reads_are_the_values_that_operations_touch(family, batch):
    one = subject(model_of(family), family)
    work, seen, touched = step_of(one, batch)
    assert work.values - seen.cached_values == touched
    assert work.flops > 0 and work.expert_flops > 0


def test_a_dense_model_reads_what_its_operations_touch():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    one = subject(GPT2LMHeadModel(config).eval(), "dense")
    work, seen, touched = step_of(one)
    assert one.layers == () and work.expert_values == 0
    assert work.values - seen.cached_values == touched
    assert seen.cached_values == 2 * 2 * 16 * CONTEXT * BATCH


def test_an_encoder_decoder_reads_neither_its_encoder_nor_what_lies_in_the_cache():
    one = subject(checkpoints.random_model(checkpoints.tiny_config("switch_transformers")), "s")
    work, seen, touched = step_of(one)
    # its table of relative positions is read by rows of the keys, which are few
    assert work.values - seen.cached_values == pytest.approx(touched, rel=2e-3)
    encoder = sum(p.numel() for p in one.model.get_encoder().parameters())
    assert touched < one.cost.params - encoder + one.model.shared.weight.numel()


def test_compressed_experts_are_read_once_where_several_choices_are_served_by_one(tmp_path):
    for name, checkpoint in forms(tmp_path):
        one = load(str(checkpoint.folder), dtype=torch.float32, device=CPU)
        one.model.set_experts_implementation("eager")
        for batch in (1, BATCH):  # in factored form experts have rows of their own: which counts
            work, seen, touched = step_of(one, batch)
            assert work.values - seen.cached_values == touched, name
            assert max(seen.distinct) <= 3
        assert one.cost.params == describe(checkpoint).num_params
        active = describe(checkpoint).num_active_params
        assert one.cost.active_params == pytest.approx(active, abs=one.cost.experts[0].numel())


def test_every_kernel_reaches_the_same_experts():
    found = {}
    for kernel in ("eager", "grouped_mm", "batched_mm"):
        model = model_of("mixtral")
        model.set_experts_implementation(kernel)
        _, seen, _ = step_of(subject(model, kernel))
        found[kernel] = [layer.tolist() for layer in seen.hit]
        assert seen.flops == pytest.approx(129792), kernel
    assert found["eager"] == found["grouped_mm"] == found["batched_mm"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("each", every_family.experts_classes(), ids=lambda each: each.name)
def test_predicted_reads_are_exact_in_every_family_that_decodes(each):
    model = built(each)
    if model is None:
        pytest.skip("no language model")
    one = subject_or_none(model)
    if one is None or one.cost is None:
        pytest.skip("not covered, or its tiny model cannot decode with a cache")
    one.model.set_experts_implementation("eager")
    work, seen, touched = step_of(one)
    assert work.values - seen.cached_values == touched


def built(each):
    for cls in each.models():
        try:
            model = cls(every_family.tiny_config(cls.config_class)).eval()
        except (TypeError, ValueError, AttributeError):
            continue
        checkpoints.randomise(model)
        return model if model.can_generate() else None
    return None


def subject_or_none(model):
    try:
        return subject(model, "a")
    except ValueError as error:
        if "seem to only contain LinearAttention layers" not in str(error):
            raise
        return None  # a tiny model with nothing else


def test_a_view_of_a_parameter_has_read_nothing_yet():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    with torch.no_grad(), _Reads([weight]) as reads:
        turned = weight.t()
        assert not reads.whole
        torch.ones(1, 3) @ turned
    assert len(reads.whole) == 1


# --- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe"])
def test_distinct_experts_are_the_best_of_the_router_logits(family):
    one = subject(model_of(family), family)
    ids = drawn(4, 1)
    with torch.no_grad(), reached(one.model, one.layers) as calls:
        out = one.model(ids, output_router_logits=True)
    for (call,), logits, layer in zip(calls, out.router_logits, one.layers, strict=True):
        chosen = {e for row in logits for e in row.topk(layer.top_k).indices.tolist()}
        assert set(call.tolist()) == chosen


def test_mapped_experts_are_counted_as_they_are_stored(tmp_path):
    mapped.register()
    name, checkpoint = next(forms(tmp_path))
    one = load(str(checkpoint.folder), dtype=torch.float32, device=CPU)
    with torch.no_grad(), reached(one.model, one.layers) as calls:
        out = one.model(drawn(5, 1), output_router_logits=True)
    for (call,), logits, layer in zip(calls, out.router_logits, one.layers, strict=True):
        slots = one.model.get_submodule(layer.experts).expert_map.tolist()
        chosen = {slots[e] for row in logits for e in row.topk(layer.top_k).indices.tolist()}
        assert set(call.tolist()) == chosen and name == "mapped"


# --- the state that steps begin at ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "minimax", "jamba", "qwen3_next"])
def test_a_step_is_the_same_each_time_whatever_the_cache_holds(family):
    model, logits = model_of(family), []
    ids, token = drawn(2, CONTEXT), drawn(2, 1, seed=1)
    model.register_forward_hook(lambda module, given, output: logits.append(output.logits))
    with torch.inference_mode():
        state = State(model, ids, 2)
        before = state.cached_values
        for _ in range(3):
            state.step(token)
            state.back()
            assert state.cached_values == before
    torch.testing.assert_close(logits[-1], logits[-2], rtol=0, atol=0)
    torch.testing.assert_close(logits[-2], logits[-3], rtol=0, atol=0)


def test_rows_beyond_the_contexts_repeat_them():
    model, ids = model_of("mixtral"), drawn(2, 5)
    with torch.inference_mode():
        few, many = State(model, ids, 2), State(model, ids, 5)
    assert many.cached_values == 5 / 2 * few.cached_values


def test_checkpoints_of_experts_that_are_not_known_are_timed_alone(tmp_path, monkeypatch):
    from smelt.checkpoint import bind

    folder = checkpoints.save("mixtral", tmp_path / "m")
    monkeypatch.setitem(bind.NOT_COVERED, "mixtral", "this test says so")
    one = load(str(folder), dtype=torch.float32, device=CPU)
    assert one.cost is None and one.layers is None
    assert Checkpoint.open(folder).fingerprint == one.fingerprint
