"""Laws of measuring decode steps: what is timed, what is counted, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from commands import smelt
from samoe.tiny import build, tiny, tokens
from smelt.bench import decode
from smelt.bench.decode import DecodeSettings, measure
from smelt.bench.floors import floors
from smelt.bench.roofline import Rates, Roofline
from smelt.bench.run import shortest_names
from smelt.bench.state import State
from smelt.bench.subjects import Subject, load
from smelt.bench.traffic import SaMoECost, Work
from smelt.errors import CheckpointError, RecipeError

pytestmark = pytest.mark.usefixtures("small_cache")

CPU = torch.device("cpu")
QUICK = DecodeSettings(batches=(3,), contexts=(4,), turns=2, steps=2)


def subject(name="a", seed=0, **fields):
    model = build(tiny(**fields), seed=seed)
    return Subject(name, model, SaMoECost(model.config))


def cell(one=None, settings=QUICK, batch=3, context=4):
    return decode._Cell(one or subject(), batch, context, settings)


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 4])
@pytest.mark.parametrize("batch", [2, 11])
def test_every_step_begins_at_the_same_cache(batch, context):
    with torch.inference_mode():
        one = cell(batch=batch, context=context)
        lengths, model = [], one.subject.model
        real = model.forward

        def forward(**kwargs):
            length = kwargs["past_key_values"].get_seq_length()
            lengths.append((len(kwargs["input_ids"]), length))
            return real(**kwargs)

        model.forward = forward
        one.count()
        one.turn()
    assert lengths == [(batch, context)] * 7  # two seen, one of them for its FLOPs, and two turns
    assert one.state.cache.get_seq_length() == context


@pytest.mark.parametrize("batch", [2, 5])
def test_a_step_is_the_next_token_after_the_context(batch):
    model, logits = build(tiny()), []
    model.register_forward_hook(lambda module, given, output: logits.append(output.logits[:, -1]))
    ids, token = tokens(2, 4), tokens(batch, 1, seed=2)
    with torch.inference_mode():
        State(model, ids, batch).step(token)
        model(torch.cat([ids[torch.arange(batch) % 2], token], 1), use_cache=False)
    torch.testing.assert_close(logits[-2], logits[-1], rtol=1e-4, atol=1e-4)


def test_rows_and_steps_have_tokens_of_their_own():
    given = cell(batch=8, settings=replace(QUICK, steps=4)).tokens
    assert len({tuple(step.flatten().tolist()) for step in given}) == 5
    assert all(len(step.unique()) > 4 for step in given)


def test_models_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(decode._Cell, "turn", lambda cell: order.append(cell.subject.name))
    monkeypatch.setattr(decode._Cell, "record", lambda cell, roofline: None)
    measure([subject("a"), subject("b")], replace(QUICK, contexts=(0, 2)))
    assert order == ["a", "b"] * 4


@pytest.mark.parametrize("fields", [{}, {"shared_router": True}, {"sharing": "union"}])
def test_the_experts_counted_are_those_that_the_timed_tokens_reach(fields):
    with torch.inference_mode():
        one = cell(subject(num_experts_per_tok=2, **fields))
        one.count()
        model, expected = one.subject.model, [0.0, 0.0]
        for ids in one.tokens[1:]:
            out = model(ids, past_key_values=one.state.cache, output_router_logits=True)
            one.state.back()
            for layer, logits in enumerate(out.router_logits):
                reached = {e for row in logits for e in row.topk(2).indices.tolist()}
                expected[layer] += len(reached) / 2
    assert one.seen.distinct == expected


# --- records -------------------------------------------------------------------------------------


def test_a_record_holds_together():
    found = measure([subject()], replace(QUICK, batches=(1, 3)))
    first, second = found.steps
    assert (first.batch, second.batch, first.threads, first.dtype) == (1, 3, 1, "float32")
    for step in found.steps:
        assert 0 < step.ms <= step.ms_median
        assert step.floor_ms == max(step.byte_floor_ms, step.flop_floor_ms)
        assert step.floor_ms <= step.floor_by_part_ms * (1 + 1e-9)
        assert step.ratio == pytest.approx(step.ms / step.floor_ms)
        rate = step.bytes_read / step.ms / 1e6
        assert step.gigabytes_per_second == pytest.approx(rate)
        assert sum(step.distinct_experts) <= 2 * step.batch
    assert first.bytes_predicted == pytest.approx(first.bytes_read)  # one token: K experts


def test_the_cache_feeds_a_step_only_if_all_weights_fit_half_of_it():
    rates = Rates(memory=1e6, cache=1e9, flops={3: 1e30})
    for resident, place in ((1 << 16, "cache"), (1 << 18, "memory")):  # values of 4 bytes; 1 MiB
        work = Work(1e3, 1e3, 1e3, 1e3, resident)
        found = floors(work, rates, 3, torch.float32, CPU)
        assert found.reads_from == place
        speed = rates.cache if place == "cache" else rates.memory
        assert found.floor_ms == pytest.approx(8e3 / speed * 1e3)


def test_rates_are_the_best_of_all_turns(monkeypatch):
    roofline = Roofline(torch.float32, CPU, [1, 4])
    found = iter([(3.0, 2.0)] * 100)
    monkeypatch.setattr(Roofline, "_rates", lambda self, amount, job: next(found))
    roofline.turn()
    found = iter([(1.0, 5.0)] * 100)
    roofline.turn()
    assert roofline.wall == Rates(3.0, 3.0, {1: 3.0, 4: 3.0}, 3.0)
    assert roofline.processor == Rates(5.0, 5.0, {1: 5.0, 4: 5.0}, 5.0)


# --- leaving entries out -------------------------------------------------------------------------


def with_alpha(one, values):
    for layer, row in zip(one.model.model.moe_layers(), values, strict=True):
        layer.alpha.data.copy_(torch.tensor(row))
    return one


def test_a_samoe_model_is_measured_with_and_without_its_small_entries():
    one = with_alpha(subject("a"), [[1.0, 0.1], [0.5, -0.9]])
    settings = replace(QUICK, skip_alpha=(0.2, 0.6))
    found = measure([one, subject("b", sharing="none")], settings).steps
    assert [(s.checkpoint, s.skip_alpha, s.kept_entries) for s in found] == [
        ("a", None, None),
        ("a", 0.2, (1, 2)),
        ("a", 0.6, (1, 1)),
        ("b", None, None),
    ]
    assert found[0].bytes_read > found[1].bytes_read > found[2].bytes_read
    assert found[0].flops > found[1].flops > found[2].flops
    assert all(layer.kept is None for layer in one.model.model.moe_layers())


def test_a_threshold_that_empties_a_layer_is_refused():
    one = with_alpha(subject(), [[1.0, 0.1], [0.5, 0.4]])
    with pytest.raises(RecipeError, match="empties MoE layer 1"):
        measure([one], replace(QUICK, skip_alpha=(0.2, 0.6)))
    assert all(layer.kept is None for layer in one.model.model.moe_layers())


def test_leaving_out_entries_needs_a_model_that_has_some():
    with pytest.raises(RecipeError, match="none of these checkpoints has pool entries"):
        measure([subject(sharing="none")], replace(QUICK, skip_alpha=(0.1,)))


# --- checkpoints and the command -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "small"
    build(tiny()).save_pretrained(path)
    return path


def test_a_loaded_model_is_the_checkpoint_in_memory(folder):
    found = load(str(folder), dtype=torch.float32, device=CPU)
    expected = build(tiny()).state_dict()
    assert found.name == "small" and not found.model.training
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    low = load(str(folder), dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}


def test_an_encoder_decoder_is_measured_against_what_its_encoder_reads(tmp_path):
    from checkpoints import save

    save("switch_transformers", tmp_path / "m")
    one = load(str(tmp_path / "m"), dtype=torch.float32, device=CPU)
    settings = replace(QUICK, batches=(2,), contexts=(3, 9))
    few, many = measure([one], settings).steps
    assert few.ms > 0 and len(few.distinct_experts) == 2 and few.distinct_experts[0] == 0
    heads = 2 * 4 * 8 * 2  # keys and values, 4 heads of 8, batch 2
    cache = 6 * 2 * heads * 4  # six tokens more, of two layers, in float32
    assert many.bytes_predicted - few.bytes_predicted == pytest.approx(cache)
    assert few.bytes_predicted == pytest.approx(few.bytes_read, rel=0.3)  # without the encoder's
    with pytest.raises(RecipeError, match="--context 0: m is an encoder–decoder"):
        measure([one], replace(settings, contexts=(0,)))


def test_a_model_that_writes_no_tokens_is_refused(tmp_path):
    from transformers import BertConfig, BertForTokenClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, intermediate_size=16, **sizes)
    BertForTokenClassification(config).save_pretrained(tmp_path / "tags")
    with pytest.raises(CheckpointError, match="Give a language model"):
        load(str(tmp_path / "tags"), dtype=torch.float32, device=CPU)


def test_the_command_prints_what_it_saves(folder, tmp_path):
    words = ("--batch", "1,2", "--context", "0,3", "--repeats", 1, "--seed", 3)
    out = tmp_path / "decode.json"
    done = smelt("bench", "decode", folder, folder, *words, "-o", out, "--json")
    assert done.code == 0, done.err
    saved = json.loads(out.read_text())
    assert saved["decode"] == done.json["decode"]
    assert [(s["checkpoint"], s["batch"], s["context"]) for s in saved["decode"]] == [
        (str(folder), batch, context) for batch in (1, 2) for context in (0, 3) for _ in range(2)
    ]
    assert saved["machine"]["threads"] == 1 and saved["rates"]["memory"] > 0


def test_checkpoints_are_named_by_what_tells_them_apart():
    assert shortest_names(["/x/a"]) == ["a"]
    assert shortest_names(["/x/a/seed-0", "/x/b/seed-0"]) == ["a/seed-0", "b/seed-0"]
    assert shortest_names(["/x/a", "/x/a"]) == ["/x/a", "/x/a"]


def test_the_table_says_dtype_device_and_threads(folder):
    words = ("--batch", 1, "--context", 0, "--repeats", 1, "--dtype", "bfloat16")
    done = smelt("bench", "decode", folder, *words)
    assert done.code == 0, done.err
    assert "bfloat16 on cpu, 1 thread" in done.out and "÷ floor" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch", "0"), "--batch 0: it is at least 1"),
        (("--batch", "1,x"), "whole numbers with commas"),
        (("--context", "-1"), "--context -1: it is at least 0"),
        (("--length", "0"), "--length 0: it is at least 1"),
        (("--length", "33"), "small has 32 positions"),
        (("--context", "32"), "small has 32 positions"),
        (("--repeats", "0"), "--repeats 0: it is at least 1"),
        (("--dtype", "int8"), "--dtype int8: it is one of float32"),
        (("--dtype", "float16"), "on a CPU it is float32 or bfloat16"),
        (("--skip-alpha", "9", "--context", "0"), "empties MoE layer 0"),
        (("--device", "cuda:7"), "no such GPU"),
        (("--output", "here.json"), "here.json: exists"),
    ],
)
def test_bad_input_is_named(folder, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.json").write_text("")
    done = smelt("bench", "decode", folder, *words)
    assert done.code == 2 and message in done.err and not done.out
