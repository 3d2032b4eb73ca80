"""One command measures everything of any checkpoints, and its file says all of it again."""

import json
import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import checkpoints
import smelt as smelt_package
from commands import smelt
from samoe.tiny import build, tiny
from smelt import api
from smelt.bench import file, peak, room, run
from smelt.bench.decode import DecodeSettings
from smelt.bench.decode import measure as decode
from smelt.bench.prefill import PrefillSettings
from smelt.bench.prefill import measure as prefill
from smelt.bench.roofline import Rates, Roofline
from smelt.bench.subjects import subject
from smelt.checkpoint.source import Checkpoint
from smelt.errors import SmeltError

pytestmark = pytest.mark.usefixtures("small_cache")

CPU = torch.device("cpu")
FEW = ("--batch", "1,3", "--context", "0,4", "--length", "6", "--repeats", 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A stock model and SaMoE."""
    path = tmp_path_factory.mktemp("run")
    stock = checkpoints.save("qwen3_moe", path / "stock")
    build(tiny()).save_pretrained(path / "pool")
    return stock, path / "pool"


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    from smelt.bench import floors, roofline

    out = tmp_path_factory.mktemp("out") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        for module in (roofline, floors):
            patch.setattr(module, "last_cache_bytes", lambda device: 1 << 20)
        patch.setattr(roofline, "SHAPES", {"cpu": ((128, 64), (64, 128))})
        patch.setattr(peak, "measure", lambda job: peak.Loaded(0.5, 100, 300, job.batch))
        done = smelt("bench", *folders, *FEW, "-o", out)
    assert done.code == 0, done.err
    return out, done


# --- everything ----------------------------------------------------------------------------------


def test_every_measurement_of_every_checkpoint_is_in_the_file(saved, folders):
    found = file.load(saved[0])
    names = ["stock", "pool"]
    assert [one.checkpoint for one in found.checkpoints] == names
    cells = [(s.checkpoint, s.batch, s.context) for s in found.decode]
    assert cells == [(n, b, c) for b in (1, 3) for c in (0, 4) for n in names]
    assert [(p.checkpoint, p.length) for p in found.prefill] == [(n, 6) for n in names]
    for one, folder in zip(found.checkpoints, folders, strict=True):
        checkpoint = Checkpoint.open(folder)
        assert one.fingerprint == checkpoint.fingerprint
        assert one.folder_bytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        assert one.active_parameters < one.parameters <= one.folder_bytes / 4
        assert one.flops_per_token > 0
        assert (one.load_seconds, one.weights_memory_bytes) == (0.5, 100)
        assert (one.load_peak_bytes, one.peak_memory_bytes) == (300, 3)
        assert one.peak_of == {"batch": 3, "context": 4, "length": 6}
    fingerprints = {one.fingerprint for one in found.checkpoints}
    assert {s.fingerprint for s in [*found.decode, *found.prefill]} == fingerprints


def test_parameters_are_those_of_the_model(saved):
    stock, pool = file.load(saved[0]).checkpoints
    model = checkpoints.random_model(checkpoints.tiny_config("qwen3_moe"))
    assert stock.parameters == sum(p.numel() for p in model.parameters())
    assert pool.parameters == tiny().num_params()


def test_the_file_is_read_back_as_it_was_written(saved):
    out, _ = saved
    again = out.with_name("again.json")
    file.save(file.load(out), again)
    assert json.loads(again.read_text()) == json.loads(out.read_text())
    assert json.loads(out.read_text())["kind"] == "bench"


def test_doubts_are_said_in_table_and_file_and_are_no_failure(saved):
    out, done = saved
    found = json.loads(out.read_text())
    quiet = found["quiet"]
    assert quiet["is_quiet"] == (not quiet["reasons"]) and quiet["cells"] == 10
    assert quiet["limits"]["spread"] == 0.05
    said = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    assert said == [f"warning: {one}" for one in found["warnings"]]
    assert ("The machine was quiet." in done.out) == quiet["is_quiet"]
    small = [one for one in found["warnings"] if "too small" in one]
    assert [one.partition(":")[0] for one in small] == ["stock", "pool"]  # of 16 and 32 units


def test_points_are_on_a_roofline_of_their_cells(saved):
    found = file.load(saved[0])
    points = found.points()
    assert len(points) == len(found.decode) + len(found.prefill)
    for point, cell in zip(points, [*found.decode, *found.prefill], strict=True):
        assert point["flops_per_byte"] * point["bytes_per_second"] == pytest.approx(
            point["flops_per_second"]
        )
        assert point["flops_per_second"] == pytest.approx(cell.flops / cell.ms_median * 1e3)
    assert found.rates.copy > 0 and set(found.rates.flops) == {1, 3, 6}


# --- parts ---------------------------------------------------------------------------------------


def test_what_is_not_asked_for_is_null(folders, tmp_path):
    done = smelt("bench", "decode", folders[0], *FEW, "-o", tmp_path / "b.json", "--json")
    assert done.code == 0, done.err
    (cost,) = done.json["checkpoints"]
    assert done.json["prefill"] == [] and len(done.json["decode"]) == 4
    assert cost["load_seconds"] is None and cost["peak_memory_bytes"] is None
    assert cost["active_parameters"] is not None


def test_sizes_that_nobody_gave_fit_the_positions(folders, monkeypatch):
    monkeypatch.setattr(run, "_timed", lambda *given: asked.append(given[1:3]) or ([], []))
    asked = []
    run.measure([str(folders[1])], run.BenchSettings(("decode", "prefill")))
    ((steps, texts),) = asked
    assert steps.contexts == (0, 31) and texts.lengths == (32,)


def test_reading_one_token_reads_what_a_step_without_context_does():
    one = subject(checkpoints.random_model(checkpoints.tiny_config("mixtral")), "a")
    steps = DecodeSettings(batches=(1,), contexts=(0,), turns=1, seed=3)
    roofline = Roofline(torch.float32, CPU, [1])
    (step,) = decode([one], steps, roofline=roofline).steps
    (text,) = prefill([one], PrefillSettings(turns=2, lengths=(1,)), roofline)
    assert text.bytes_read == step.bytes_read and text.flops == step.flops
    assert text.tokens_per_second == pytest.approx(1e3 / text.ms_median)
    assert len(text.ms_turns) == 2 and text.ms == min(text.ms_turns)


def test_products_of_more_rows_than_are_measured_have_the_rate_of_the_most():
    rates = Rates(1.0, None, {1: 2.0, 256: 7.0})
    assert rates.flops_at(1) == rates.flops_at(100) == 2.0
    assert rates.flops_at(256) == rates.flops_at(4096) == 7.0
    assert Rates(flops={8: 5.0}).flops_at(1) == 5.0


def test_a_process_of_its_own_holds_the_weights_and_little_more():
    source = Path(smelt_package.__file__).parent / "data" / "tiny-moe"
    found = peak.measure(peak.Job(str(source), "float32", "cpu", 1, 64, 64, 1))
    weights = room.weight_bytes(Checkpoint.open(source), torch.float32)
    assert 0.9 * weights < found.weights_memory_bytes < weights + 20e6
    assert found.weights_memory_bytes < found.peak_memory_bytes < 3 * weights + 100e6
    assert weights < found.load_peak_bytes < 3 * weights + 100e6
    assert found.load_seconds > 0


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a bench file"),
        ("[]", "not a bench file"),
        ('{"version": 1, "results": []}', "not a bench file"),
        ('{"steps": [], "rates": {}, "machine": {}}', "of version 1, and this smelt reads 2"),
        ('{"version": 3, "kind": "bench"}', "of version 3, and this smelt reads 2"),
        ('{"version": 2, "kind": "bench"}', "machine: Field required. .* edited or cut short"),
    ],
)
def test_a_file_that_is_no_bench_file_is_named(text, message, tmp_path):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(SmeltError, match=message):
        file.load(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("decode.0.ms_median", -1.0),
        ("decode.0.ms", 0),
        ("decode.1.context", -4),
        ("prefill.0.batch", 0),
        ("checkpoints.1.folder_bytes", "many"),
        ("rates.flops", {}),
    ],
)
def test_an_edited_value_is_named_by_its_place(saved, tmp_path, place, value):
    found = json.loads(saved[0].read_text())
    *parents, last = place.split(".")
    held = found
    for name in parents:
        held = held[int(name) if name.isdigit() else name]
    held[last] = value
    (tmp_path / "b.json").write_text(json.dumps(found))
    with pytest.raises(SmeltError, match=f"{re.escape(place)}: .* edited or cut short"):
        file.load(tmp_path / "b.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SmeltError, match="no such bench file"):
        file.load(tmp_path / "b.json")


# --- bad input -----------------------------------------------------------------------------------


def test_checkpoints_that_do_not_fit_the_memory_are_refused_before_any_is_read(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(room, "free_bytes", lambda device: 100_000)
    for part in ("in_memory", "_loaded"):
        monkeypatch.setattr(run, part, lambda *given: pytest.fail("read"))
    done = smelt("bench", *folders, "-o", tmp_path / "b.json")
    assert done.code == 2 and "GB free" in done.err and "fewer at a time" in done.err
    assert not list(tmp_path.iterdir())


def test_weights_in_memory_are_predicted_from_the_files(folders):
    checkpoint = Checkpoint.open(folders[0])
    model = checkpoints.random_model(checkpoints.tiny_config("qwen3_moe"))
    parameters = sum(p.numel() for p in model.parameters())
    assert room.weight_bytes(checkpoint, torch.float32) == 4 * parameters
    assert room.weight_bytes(checkpoint, torch.bfloat16) == 2 * parameters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("decode",), "no checkpoint is named"),
        (("memory", "no-such/folder/here"), "not a checkpoint folder"),
    ],
)
def test_nothing_to_measure_is_named(words, message):
    done = smelt("bench", *words)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


def test_a_checkpoint_without_all_weights_is_refused_before_another_is_measured(
    folders, tmp_path, monkeypatch
):
    from safetensors.torch import load_file, save_file

    cut = checkpoints.save("mixtral", tmp_path / "cut")
    path = cut / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "gate" in name))
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.setattr(run, "_loaded", lambda *given: pytest.fail("measured"))
    done = smelt("bench", folders[0], cut)
    assert done.code == 2 and "is missing from the weights" in done.err


def test_a_process_that_fails_is_told_of_in_one_line(tmp_path, monkeypatch, capsys):
    job = peak.Job(str(tmp_path), "float32", "cpu", 1, 0, 4, 1)
    assert peak.main([json.dumps(asdict(job))]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no config.json" in said
    for code, message in ((2, "no config.json"), (-9, "ended by signal 9, as for want of memory")):
        ended = subprocess.CompletedProcess([], code, "", said)
        monkeypatch.setattr(peak.subprocess, "run", lambda *given, ended=ended, **named: ended)
        with pytest.raises(SmeltError, match=f"cannot be measured at batch 1.*{message}") as caught:
            peak.measure(job)
        assert "\n" not in str(caught.value)


def test_running_out_of_memory_in_a_cell_names_the_cell(monkeypatch):
    one = subject(checkpoints.random_model(checkpoints.tiny_config("mixtral")), "a")

    def fail(*given):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("smelt.bench.decode.State", fail)
    settings = replace(DecodeSettings(turns=1), batches=(7,), contexts=(5,))
    with pytest.raises(SmeltError, match=r"batch 7, context 5: out of memory.*smaller --batch"):
        decode([one], settings)


# --- from Python ---------------------------------------------------------------------------------


def test_the_function_measures_what_the_command_does(folders):
    found = api.bench(folders[0], what=["decode"], batches=[2], contexts=[3], turns=1)
    (step,) = found.decode
    assert (step.checkpoint, step.batch, step.context, step.dtype) == ("stock", 2, 3, "float32")
    assert found.prefill == [] and found.checkpoints[0].load_seconds is None
    with pytest.raises(SmeltError, match="there are decode, prefill, memory, load"):
        api.bench(folders[0], what=["speed"])
    with pytest.raises(SmeltError, match="one checkpoint at least"):
        api.bench([])
