"""Laws of perplexity: it is the model's own loss, on the predicted tokens and on no others."""

import math
from statistics import stdev

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from checkpoints import random_model, save, tiny_config
from material import random_blocks
from smelt.checkpoint.inputs import make_batches
from smelt.checkpoint.source import Checkpoint
from smelt.errors import CalibrationError, CheckpointError
from smelt.evaluate.compare import compare
from smelt.evaluate.perplexity import measure
from smelt.evaluate.results import Setting, load, markdown, rows
from smelt.evaluate.results import save as save_results
from smelt.evaluate.sequences import PerSequence, per_sequence
from smelt.text import make_blocks, tokenize
from smelt.text.sources import parse_source
from smelt.train.data import train_tokenizer

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def own_loss(folder, blocks):
    """transformers' own loss of each sequence alone, padding cut off."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return [
            float(model(input_ids=ids[mask][None], labels=ids[mask][None]).loss)
            for ids, mask in zip(blocks.input_ids, blocks.mask, strict=True)
        ]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_it_is_the_loss_of_transformers_padding_left_out(family, tmp_path):
    checkpoint = Checkpoint.open(save(family, tmp_path))
    blocks = random_blocks(padding=7)
    found = measure(checkpoint, make_batches(checkpoint, blocks, 2), blocks.num_bytes)

    expected = torch.tensor(own_loss(tmp_path, blocks), dtype=torch.float64)
    count = blocks.mask.sum(1) - 1
    torch.testing.assert_close(found.sequences.total, expected * count, rtol=1e-5, atol=1e-5)
    assert found.sequences.count.tolist() == count.tolist()
    assert found.nats == pytest.approx(float((expected * count).sum() / count.sum()), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats))


def test_it_does_not_depend_on_batch_size(tmp_path):
    checkpoint = Checkpoint.open(save("qwen3_moe", tmp_path))
    blocks = random_blocks(padding=7)
    found = [
        measure(checkpoint, make_batches(checkpoint, blocks, size), blocks.num_bytes)
        for size in (1, 4, 6)
    ]
    for other in found[1:]:
        assert other.num_tokens == found[0].num_tokens
        assert other.num_bytes == found[0].num_bytes
        torch.testing.assert_close(other.sequences.total, found[0].sequences.total, **CLOSE)


def test_what_the_padding_holds_does_not_matter(tmp_path):
    checkpoint = Checkpoint.open(save("qwen3_moe", tmp_path))
    blocks = random_blocks(padding=7)
    other = make_blocks(blocks.input_ids.masked_fill(~blocks.mask, 3), blocks.mask, 5)
    totals = [
        measure(checkpoint, make_batches(checkpoint, b, 3), 5).sequences.total
        for b in (blocks, other)
    ]
    torch.testing.assert_close(totals[0], totals[1], **CLOSE)


def test_bits_per_byte_times_bytes_are_the_nats(tmp_path):
    checkpoint = Checkpoint.open(save("mixtral", tmp_path))
    blocks = random_blocks()
    found = measure(checkpoint, make_batches(checkpoint, blocks, 6), blocks.num_bytes)
    nats = float(found.sequences.total.sum())
    assert found.num_bytes is not None
    assert found.bits_per_byte is not None
    assert found.bits_per_byte * found.num_bytes * math.log(2) == pytest.approx(nats)
    # five bytes a token, and the first of every sequence is not predicted
    assert found.num_bytes == pytest.approx(5 * 6 * 19)


def test_a_chunk_of_logits_is_small_and_changes_nothing():
    logits = torch.randn(3, 10, 50)
    where = torch.rand(3, 10) > 0.3
    seen = []

    def take(places):
        seen.append(len(places))
        return logits.flatten(0, 1)[places].exp().sum(-1, keepdim=True)

    (small,) = per_sequence(where, 1 << 20, 1, take)
    assert max(seen) == 4
    (whole,) = per_sequence(where, 50, 1, take)
    expected = (logits.exp().sum(-1) * where).sum(1).double()
    torch.testing.assert_close(small.total, expected, **CLOSE)
    torch.testing.assert_close(whole.total, expected, **CLOSE)
    assert whole.count.tolist() == where.sum(1).tolist()


def test_standard_error_counts_sequences():
    means = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    alike = PerSequence(means * 10, torch.full((4,), 10))
    assert alike.standard_error == pytest.approx(float(means.std()) / 2)
    with_empty = PerSequence(
        torch.cat([alike.total, torch.zeros(1)]), torch.tensor([10, 10, 10, 10, 0])
    )
    assert with_empty.standard_error == pytest.approx(alike.standard_error)
    assert PerSequence(means[:1], torch.tensor([10])).standard_error is None
    # a constant shift is known exactly: pairs take out what the sequences have in common
    assert alike.minus(PerSequence(alike.total - 5, alike.count)).standard_error == 0


def test_an_encoder_decoder_is_measured_on_the_spans_it_restores(tmp_path):
    lines = [" ".join(f"word{(i * j) % 17}" for j in range(12)) for i in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    source = parse_source(str(tmp_path / "text.txt"))
    tokenizer = train_tokenizer([source], vocab_size=300, num_sentinels=8)
    config = tiny_config("switch_transformers", vocab_size=300, expert_capacity=64)
    random_model(config).save_pretrained(tmp_path / "switch")
    tokenizer.save_pretrained(tmp_path / "switch")
    checkpoint = Checkpoint.open(tmp_path / "switch")
    blocks = tokenize([source], checkpoint.tokenizer, num_tokens=400, sequence_length=32)

    batches = make_batches(checkpoint, blocks, 3)
    found = measure(checkpoint, batches, blocks.num_bytes)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "switch")
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            number = int((batch.labels >= 0).sum())
            total += float(model(**batch.inputs, labels=batch.labels).loss) * number
            count += number
    assert found.num_tokens == count
    assert found.nats == pytest.approx(total / count, rel=1e-5)
    assert found.bits_per_byte is None
    one = measure(checkpoint, make_batches(checkpoint, blocks, 50), blocks.num_bytes)
    torch.testing.assert_close(one.sequences.total, found.sequences.total, **CLOSE)


# --- side by side --------------------------------------------------------------------------------


def test_the_same_checkpoint_twice_differs_by_nothing(tmp_path):
    first = Checkpoint.open(save("mixtral", tmp_path / "a"))
    other = Checkpoint.open(save("mixtral", tmp_path / "b", seed=1))
    blocks = random_blocks()
    found = compare([first, first, other], lambda checkpoint: blocks)
    assert found[0].difference is None
    assert found[1].difference.mean == 0
    assert found[1].difference.standard_error == 0
    paired = found[2].perplexity.nats - found[0].perplexity.nats
    assert found[2].difference.mean == pytest.approx(paired)
    setting = Setting(("random",), blocks.sha256, seed=0)
    kept = [one.perplexity.records(first, setting)[0] for one in (found[0], found[2])]
    assert [sum(one.by_sequence) for one in kept] == pytest.approx([one.value for one in kept])
    pairs = [b - a for a, b in zip(*(one.by_sequence for one in kept), strict=True)]
    error = len(pairs) ** 0.5 * stdev(pairs)
    assert error == pytest.approx(found[2].difference.standard_error, rel=1e-6)
    table = markdown([one.row() for one in found])
    assert len(table.splitlines()) == 5
    assert len({len(line) for line in table.splitlines()}) == 1


def test_other_tokens_compare_by_bits_per_byte_only(tmp_path):
    checkpoints = [Checkpoint.open(save("mixtral", tmp_path / n)) for n in "ab"]

    def text(checkpoint):
        return random_blocks(length=20 if checkpoint is checkpoints[0] else 16)

    with pytest.raises(CalibrationError, match="^b and a cut the text into different tokens"):
        compare(checkpoints, text)
    found = compare(checkpoints, text, bits_per_byte_only=True)
    assert found[1].difference is None
    assert found[1].perplexity.bits_per_byte > 0


def test_bad_input_is_refused_in_words(tmp_path):
    checkpoint = Checkpoint.open(save("mixtral", tmp_path / "a"))
    blocks = random_blocks()
    blocks.input_ids[0, 0] = 199
    with pytest.raises(CheckpointError, match="token id 199"):
        measure(checkpoint, make_batches(checkpoint, blocks, 2), 5)
    short = random_blocks(length=1)
    with pytest.raises(CalibrationError, match="at least two tokens"):
        measure(checkpoint, make_batches(checkpoint, short, 2), 5)
    model = random_model(tiny_config("mixtral"))
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    broken = Checkpoint.open(tmp_path / "nan")
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        measure(broken, make_batches(broken, random_blocks(), 2), 5)


# --- records -------------------------------------------------------------------------------------


def test_records_come_back_as_they_were_saved(tmp_path):
    checkpoint = Checkpoint.open(save("mixtral", tmp_path / "a"))
    blocks = random_blocks()
    found = measure(checkpoint, make_batches(checkpoint, blocks, 2), blocks.num_bytes)
    setting = Setting(("python",), blocks.sha256, seed=3)
    records = found.records(checkpoint, setting)
    assert [r.metric for r in records] == ["nats per token", "perplexity", "bits per byte"]
    assert records[1].standard_error == pytest.approx(found.perplexity * found.standard_error)
    assert records[0].fingerprint == checkpoint.fingerprint
    assert records[0].dtype == "float32"
    assert records[0].plan_sha256 is None
    save_results(records, tmp_path / "new" / "results.json")
    assert load(tmp_path / "new" / "results.json") == records
    assert not list(tmp_path.rglob("*.part"))
    assert "nats per token" in markdown(rows(records))
