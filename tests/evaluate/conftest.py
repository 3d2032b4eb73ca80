"""Tiny checkpoints of families, calibrated once per session."""

from collections.abc import Callable

import pytest

from checkpoints import save
from material import Material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Material]:
    """`material("mixtral")`, made once per session."""
    made: dict[str, Material] = {}

    def get(family: str) -> Material:
        if family not in made:
            made[family] = Material(save(family, tmp_path_factory.mktemp(family)))
        return made[family]

    return get
