"""What all tests share: no network, quiet libraries, reproducible hypothesis runs, and tests marked gpu skipped where there is none."""

import os
from pathlib import Path

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TF_CPP_MIN_LOG_LEVEL="3",
    MPLBACKEND="Agg",
)

# Workers share the processor: without this each of them, and each notebook's kernel, would start a thread on every core.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    _threads = str(max(1, (os.cpu_count() or 1) // _workers))
    os.environ.update(OMP_NUM_THREADS=_threads, TF_NUM_INTRAOP_THREADS=_threads)

# Notebooks and sub-processes run in other folders.
if os.environ.get("RECSYS_IMPORTANCE_DATA"):
    os.environ["RECSYS_IMPORTANCE_DATA"] = str(Path(os.environ["RECSYS_IMPORTANCE_DATA"]).resolve())


def pytest_configure(config):
    # A GPU machine may run single test files without the development tools.
    if not config.pluginmanager.hasplugin("hypothesispytest"):
        return
    from hypothesis import settings

    # Time limits of single examples measure the machine, not the code; under CI the same examples are drawn every time.
    settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
    settings.load_profile("house")


@pytest.fixture(scope="session")
def repository():
    return Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
