"""The ground of every test: no network, one thread, fixed seeds, shapes checked at every call."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before transformers or huggingface_hub is imported, by a test or by a process that a test starts:
# nothing is fetched, and modelling files loaded with trust_remote_code are cached in a folder of
# this process (two pytest-xdist workers that share one overwrite each other's).
_CACHE = Path(tempfile.mkdtemp(prefix="smelt-tests-"))
os.environ.update(
    HF_HOME=str(_CACHE),
    SMELT_CACHE=str(_CACHE / "tokens"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    CUBLAS_WORKSPACE_CONFIG=":4096:8",
)

from jaxtyping import install_import_hook  # noqa: E402

CHECKED = (
    "smelt.experts",
    "smelt.factors",
    "smelt.routing",
    "smelt.compress.similarity",
    "smelt.compress.budget",
    "smelt.compress.group",
    "smelt.compress.align",
    "smelt.compress.members",
    "smelt.compress.merge",
    "smelt.compress.rebasin",
    "smelt.compress.fisher",
    "smelt.compress.regmean",
    "smelt.compress.repair",
    "smelt.compress.zipit",
    "smelt.compress.rules",
    "smelt.compress.router",
    "smelt.compress.refit",
    "smelt.compress.decompose",
    "smelt.compress.ranks",
    "smelt.compress.grams",
    "smelt.compress.units",
    "smelt.compress.reconstruct",
    "smelt.compress.closed_form",
    "smelt.compress.grouping",
    "smelt.compress.least_squares",
    "smelt.compress.subspace",
    "smelt.train.distill",
    "smelt.train.sparsify",
    "smelt.samoe.dispatch",
    "smelt.samoe.grouped",
    "smelt.samoe.pool",
)
"""The pure tensor modules: a wrong shape is an error at the call, not three functions later."""

# Python compiles a module once per process, so the hook is in place before the first import.
install_import_hook(CHECKED, "shapes.check")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test whose ground is missing here is skipped, and the summary says what it needs."""
    has_data = bool(os.environ.get("SMELT_DATA"))
    has_gpu = torch.cuda.is_available()
    for item in items:
        if "data" in item.keywords and not has_data:
            item.add_marker(pytest.mark.skip(reason="SMELT_DATA is not set"))
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_unconfigure() -> None:
    """Removes this process's cache folder."""
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def smelt_data() -> Path:
    """The folder of texts and tasks that SMELT_DATA names; tests that need it are marked `data`."""
    named = os.environ.get("SMELT_DATA")
    if not named:
        pytest.skip("SMELT_DATA is not set")
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"SMELT_DATA={named}: there is no such folder")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same state of every generator, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test draw from it)
    torch.manual_seed(0)
    yield
    # A test that changes a global of torch is named, not left to break the next one.
    assert torch.get_default_dtype() == torch.float32, "the test left another default dtype behind"


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator: randomness enters smelt as an argument."""
    return torch.Generator().manual_seed(0)
