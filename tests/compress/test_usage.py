"""The usage that stays with a compressed folder is that of the statistics it was made from."""

from pathlib import Path

import pytest

from commands import QUICK, make_source, smelt, text_file
from smelt.compress.calibrate import RoutingStats
from smelt.compress.usage import FILE, read_usage
from smelt.errors import CheckpointError


def test_a_folder_keeps_the_counts_of_its_statistics(tmp_path: Path) -> None:
    source, text = make_source(tmp_path / "source"), text_file(tmp_path)
    words = ("--set", "sequence_length=32", "--tokens", "600", "--text", text)
    assert smelt("calibrate", source, tmp_path / "stats", *words).code == 0
    words = ("--stats", tmp_path / "stats", "--keep", 0.5, "--form", "mapped")
    assert smelt("compress", source, tmp_path / "out", *words, *QUICK).code == 0
    stats, usage = RoutingStats.load(tmp_path / "stats"), read_usage(tmp_path / "out" / FILE)
    assert (usage.text, usage.num_tokens) == (stats.text, stats.num_tokens)
    for name, layer in stats.layers.items():
        assert list(usage.count[name]) == layer.count.tolist()
        assert usage.saliency[name] == pytest.approx(layer.saliency.tolist(), rel=1e-5)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "layers": {}}'])
def test_a_file_that_is_no_usage_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "usage.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read as the usage"):
        read_usage(tmp_path / "usage.json")
