"""Decode steps of GGUF files: every file at every context, in turns; contexts that fit."""

import pytest

from checkpoints import save
from commands import smelt
from llama import needs_llama
from smelt import api
from smelt.bench.file import load
from smelt.errors import RecipeError

pytestmark = needs_llama


def files(tmp_path, *schemes):
    from smelt.export.gguf_file import GgufFile

    folder = save("qwen3_moe", tmp_path / "model", hidden_size=64, moe_intermediate_size=64)
    return [
        GgufFile(api.export_gguf(folder, tmp_path / f"{name}.gguf", quantise=name).path)
        for name in schemes
    ]


def test_every_file_is_timed_at_every_context(tmp_path):
    from smelt.bench.gguf_decode import measure

    both = files(tmp_path, "Q8_0", "Q4_K")
    checkpoints, decode = measure(both, contexts=(0, 16), turns=3, steps=2)
    cells = [(one.checkpoint, one.context) for one in decode]
    assert cells == [(name, c) for c in (0, 16) for name in ("Q8_0.gguf", "Q4_K.gguf")]
    for one in decode:
        assert 0 < one.ms <= one.ms_median and one.processor_ms > 0
    for one, file in zip(checkpoints, both, strict=True):
        assert one.fingerprint == file.fingerprint
        assert one.folder_bytes == file.path.stat().st_size
        assert one.load_seconds > 0
        assert one.parameters == both[0].num_params


def test_files_stand_beside_the_checkpoint_in_one_run(tmp_path):
    file = files(tmp_path, "Q8_0")[0]
    sizes = {"batches": [1], "contexts": [0, 8], "turns": 1}
    found = api.bench([tmp_path / "model", file.path], what=["decode"], **sizes)
    cells = [(one.checkpoint, one.context) for one in found.decode]
    assert cells == [(name, c) for name in ("model", "Q8_0.gguf") for c in (0, 8)]
    alone = api.bench([file.path], what=["decode"], **sizes)
    assert [one.checkpoint for one in alone.decode] == ["Q8_0.gguf"] * 2
    with pytest.raises(RecipeError, match="decode steps alone"):
        api.bench([file.path], what=["prefill"])


def test_the_command_takes_a_file_and_saves_what_can_be_read(tmp_path):
    file = files(tmp_path, "Q8_0")[0]
    words = ("decode", file.path, "--context", "0", "--repeats", 1, "-o", tmp_path / "b.json")
    done = smelt("bench", *words)
    assert done.code == 0, done.err
    assert "Q8_0.gguf" in done.out
    assert load(tmp_path / "b.json").decode[0].dtype == "Q8_0"


def test_steps_go_on_where_the_context_ends(tmp_path, monkeypatch):
    from smelt.bench.gguf_decode import measure
    from smelt.export.engine import Engine

    places = []
    logits = Engine.logits

    def watched(self, tokens, *, start=0):
        places.append((start, len(tokens)))
        return logits(self, tokens, start=start)

    monkeypatch.setattr(Engine, "logits", watched)
    measure(files(tmp_path, "Q8_0"), contexts=(16,), turns=2, steps=2)
    assert places == [(0, 16), *((16 + i, 1) for i in range(6))]


def test_a_context_beyond_the_positions_is_refused(tmp_path):
    from smelt.bench.gguf_decode import measure

    with pytest.raises(RecipeError, match="128 positions"):
        measure(files(tmp_path, "Q8_0"), contexts=(120,))
