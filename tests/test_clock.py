"""The benchmarks' clock names functions of smelt where they are looked up."""

import sys
import time

from project import ROOT


def test_every_function_that_is_timed_is_there_and_is_put_back(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from _clock import PHASES, Clock
    from smelt.compress import inputs

    kept = inputs.read_text
    with Clock(time.perf_counter).watching(PHASES):
        assert inputs.read_text is not kept
    assert inputs.read_text is kept
