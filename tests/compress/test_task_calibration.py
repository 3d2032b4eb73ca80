"""Laws of statistics on a task: the encoder reads its inputs, the decoder its targets."""

import warnings

import pytest
import torch

from benchmarks import write_tasks
from healing_material import original
from smelt.checkpoint.inputs import Batch
from smelt.checkpoint.source import Checkpoint
from smelt.compress.calibrate import calibrate
from smelt.compress.inputs import read_inputs
from smelt.compress.pipeline import run_calibration
from smelt.errors import CalibrationError, RecipeError
from smelt.recipe import CalibrationRecipe
from smelt.settings import check_recipe
from smelt.text.spans import IGNORED
from smelt.text2text.encode import Encoder
from smelt.text2text.files import read_items


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("task-calibration")


@pytest.fixture(autouse=True)
def _files(folder, monkeypatch):
    if not (folder / "tasks").exists():
        write_tasks(folder / "tasks")
    monkeypatch.setenv("SMELT_DATA", str(folder / "tasks"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*calibration tokens reach.*")
        yield


@pytest.fixture(scope="module")
def checkpoint(folder):
    return Checkpoint.open(original(folder, "switch_transformers"))


def wanted(**changed):
    task = {"name": "squad", "limit": 12, "max_input": 128}
    return check_recipe({"task": task, "batch_size": 5, **changed}, CalibrationRecipe)


def test_inputs_are_those_of_fine_tuning_with_masks_right_on_both_sides(checkpoint):
    batches, _ = read_inputs(checkpoint, wanted(seed=3))
    encoder = Encoder(checkpoint.tokenizer, max_input=128, max_target=32)
    encoded = {
        (one.input_ids, one.target_ids)
        for one in encoder.encode(read_items("squad", "train").items, for_training=True)
    }
    rows = 0
    for batch in batches:
        for row in range(len(batch.mask)):
            read = tuple(batch.inputs["input_ids"][row, batch.mask[row]].tolist())
            said = tuple(batch.labels[row, batch.decoder_mask[row]].tolist())
            before = batch.inputs["decoder_input_ids"][row, batch.decoder_mask[row]].tolist()
            assert (read, said) in encoded
            assert before == [checkpoint.config.decoder_start_token_id, *said[:-1]]
            assert bool((batch.labels[row, ~batch.decoder_mask[row]] == IGNORED).all())
            rows += 1
    assert rows == 12
    assert any(not bool(batch.mask.all()) for batch in batches)


def test_statistics_do_not_depend_on_the_batch_size_or_on_padding(checkpoint):
    few, _ = read_inputs(checkpoint, wanted(batch_size=1))
    many, sha256 = read_inputs(checkpoint, wanted(batch_size=12))
    padded = [_padded(batch) for batch in many]
    found = [
        calibrate(checkpoint, batches, text=sha256, sample_tokens=64)
        for batches in (few, many, padded)
    ]
    tokens = {one.num_tokens for one in found}
    assert len(tokens) == 1
    for name, layer in found[0].layers.items():
        for other in found[1:]:
            assert torch.equal(layer.count, other.layers[name].count)
            assert torch.allclose(layer.logit_gram, other.layers[name].logit_gram, rtol=1e-4)
        side = "decoder_mask" if name.startswith("decoder") else "mask"
        assert layer.num_tokens == sum(int(getattr(batch, side).sum()) for batch in many)


def _padded(batch, more=3):
    def wide(value, fill):
        return torch.nn.functional.pad(value, (0, more), value=fill)

    inputs = {name: wide(value, 0) for name, value in batch.inputs.items()}
    return Batch(
        inputs, wide(batch.mask, False), wide(batch.decoder_mask, False), wide(batch.labels, -100)
    )


def test_the_hash_is_that_of_the_tokens(checkpoint):
    hashes = [
        read_inputs(checkpoint, wanted(**changed))[1]
        for changed in (
            {},
            {"batch_size": 2},
            {"seed": 1},
            {"task": {"name": "squad", "limit": 12, "max_input": 30}},
        )
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_gradients_are_of_the_targets(checkpoint):
    found = run_calibration(checkpoint, wanted(gradients=True)).stats
    assert found.fisher is not None and found.fisher.num_sequences == 12
    assert all(layer.gradient_gram.diagonal().sum() > 0 for layer in found.layers.values())
    assert found.details["task"]["name"] == "squad"


def test_a_task_is_for_encoder_decoders_and_has_a_known_name(checkpoint, folder):
    causal = Checkpoint.open(original(folder, "qwen3_moe"))
    with pytest.raises(CalibrationError, match="no encoder–decoder, and task squad"):
        read_inputs(causal, wanted())
    with pytest.raises(RecipeError, match="there is no task 'sqad'. The tasks are: sst2"):
        read_inputs(checkpoint, wanted(task={"name": "sqad"}))
