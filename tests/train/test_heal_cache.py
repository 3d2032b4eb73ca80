"""Laws of kept predictions: those of the teacher, bound to what they were made of, made once."""

import pytest
import torch

from healing_material import original, run
from smelt.checkpoint.source import Checkpoint
from smelt.checkpoint.whole import load_model
from smelt.errors import CalibrationError, RecipeError
from smelt.train import heal_cache
from smelt.train.batches import ExampleRows
from smelt.train.distill import distillation
from smelt.train.heal_cache import keep_predictions
from smelt.train.heal_settings import CacheSettings


@pytest.fixture
def rows(generator):
    """Seven random sequences, the last one with padding."""
    ids = torch.randint(3, 300, (7, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return ExampleRows(
        [
            {"input_ids": i, "attention_mask": m, "labels": y}
            for i, m, y in zip(ids, mask, labels, strict=True)
        ]
    )


@pytest.fixture
def teacher(folder):
    return Checkpoint.open(original(folder, "qwen3_moe"))


def keep(teacher, rows, place, *, tokenizer="t", temperature=2.0, is_named=True, **settings):
    return keep_predictions(
        teacher,
        rows,
        CacheSettings(**{"top_k": 5, "batch_size": 2, **settings}),
        temperature=temperature,
        tokenizer_sha256=tokenizer,
        folder=place,
        is_named=is_named,
    )


def test_what_is_kept_is_what_the_model_says(teacher, rows, tmp_path):
    kept = keep(teacher, rows, tmp_path / "kept", values="float32")
    model = load_model(teacher)
    for numbers in ([0, 1, 2], [6], [3, 6, 0]):
        batch = rows.__getitems__(numbers)
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        target = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        real = target != -100
        top = kept.take(numbers)
        exact = logits[real].topk(5)
        assert torch.equal(top.ids.long(), exact.indices)
        for t in (1.0, 2.0):
            torch.testing.assert_close(
                top.log_probability(t),
                (logits[real] / t).log_softmax(-1).gather(-1, exact.indices),
                rtol=1e-4,
                atol=1e-5,
            )
        nats = distillation(logits.flatten(0, 1), target.flatten(), None).cross_entropy
        assert float(kept.nats(numbers).sum()) == pytest.approx(float(nats), rel=1e-5)


def test_a_killed_making_goes_on_and_ends_in_the_same_bytes(teacher, rows, tmp_path, monkeypatch):
    whole = keep(teacher, rows, tmp_path / "whole").folder
    monkeypatch.setattr(heal_cache, "WINDOW_BYTES", 1)  # a batch at a time
    write, calls = heal_cache._write_at, []

    def dying(path, row, values):
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        write(path, row, values)

    monkeypatch.setattr(heal_cache, "_write_at", dying)
    with pytest.raises(KeyboardInterrupt):
        keep(teacher, rows, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    calls.clear()
    monkeypatch.setattr(heal_cache, "_write_at", lambda *a: (calls.append(a), write(*a)))
    kept = keep(teacher, rows, tmp_path / "kept").folder
    assert len(calls) == 4 * 3  # the first of four batches was done
    for file in whole.iterdir():
        assert file.read_bytes() == (kept / file.name).read_bytes(), file.name
    calls.clear()
    keep(teacher, rows, tmp_path / "kept")
    assert not calls  # nothing is made twice


def test_predictions_of_something_else_are_refused(teacher, rows, tmp_path):
    keep(teacher, rows, tmp_path / "kept")
    other = ExampleRows(rows.examples[:5])
    with pytest.raises(CalibrationError, match="kept: holds predictions of another text. Name"):
        keep(teacher, other, tmp_path / "kept")
    with pytest.raises(CalibrationError, match="another tokenizer"):
        keep(teacher, rows, tmp_path / "kept", tokenizer="u")
    with pytest.raises(CalibrationError, match="another top_k, another temperatures"):
        keep(teacher, rows, tmp_path / "kept", top_k=6, temperature=3.0)
    with pytest.raises(RecipeError, match="top_k = 301: the teacher has 300 tokens"):
        keep(teacher, rows, tmp_path / "more", top_k=301)


def test_without_a_name_other_settings_have_other_folders(teacher, rows, tmp_path):
    one = keep(teacher, rows, tmp_path, is_named=False)
    two = keep(teacher, rows, tmp_path, is_named=False, top_k=6)
    assert one.folder != two.folder and one.folder.parent == two.folder.parent == tmp_path


@pytest.mark.parametrize("family", ["qwen3_moe", "switch_transformers"])
def test_with_all_tokens_kept_it_heals_as_with_the_teacher_itself(values, tmp_path, family):
    given = values("mapped", family, steps=3)
    live = run(given)
    size = Checkpoint.open(given["teacher"]).config.vocab_size
    cache = {"top_k": size, "values": "float32", "folder": str(tmp_path / "kept")}
    kept = run(given, cache=cache, output=str(tmp_path / "other"))
    for name in ("before", "after"):
        (one,), (two,) = live[name].values(), kept[name].values()
        assert one == pytest.approx(two, rel=2e-3, abs=1e-5)
    assert kept["kl"].endswith("a lower bound")
    text = {**given["text"], "seed": 1}
    with pytest.raises(CalibrationError, match="holds predictions of another text"):
        run(given, cache=cache, text=text, output=str(tmp_path / "third"))


def test_a_kept_distance_is_a_lower_bound(values, tmp_path):
    given = values("mapped", steps=1)
    live = run(given)
    kept = run(given, cache={"top_k": 3}, output=str(tmp_path / "other"))
    (one,), (two,) = live["before"].values(), kept["before"].values()
    assert 0 < two["kl_to_teacher"] < one["kl_to_teacher"]
    assert two["teacher_nats_per_token"] == pytest.approx(one["teacher_nats_per_token"], rel=1e-5)
