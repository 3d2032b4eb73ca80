"""A machine of a small cache and small matrices: its rates are measured in a blink."""

import pytest

from smelt.bench import floors, roofline


@pytest.fixture
def small_cache(monkeypatch):
    for module in (roofline, floors):
        monkeypatch.setattr(module, "last_cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(roofline, "SHAPES", {"cpu": ((128, 64), (64, 128))})
